"""Weights of a base model one at a time, from its files: a DoRA's update depends on them, and no network is built."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import Tensor

from trainkit.errors import Problem, UserError
from trainkit.families.file_names import TEXT_MODEL, ModulePlace
from trainkit.families.pretrained import Repo, weight_name


class BaseWeights:
    """place -> W [out,in] in fp64, a convolution's kernel in a row; of a model folder, or a model fetched from the Hub.

    UserError: the model has no such module, or no weights in safetensors.
    """

    def __init__(self, repo: Repo):
        self.repo = repo
        self._files = cache(self._find_files)

    def __call__(self, place: ModulePlace) -> Tensor:
        from safetensors import safe_open

        network, path = place
        names = self._files(network)
        name = next((n for n in (f"{path}.weight", f"{TEXT_MODEL}{path}.weight") if n in names), None)
        if name is None:
            raise UserError(self.repo.problem(f"the base model has no module {path} in its {network}",
                                              "the LoRA was trained on another one", "name it with --base",
                                              kind="data"))
        with safe_open(names[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.double().flatten(1)

    def _find_files(self, network: str) -> dict[str, Path]:
        """Name of a tensor -> the file that it is in."""
        from safetensors import SafetensorError, safe_open

        folder = self.repo.folder(network)
        names: dict[str, Path] = {}
        try:
            found = [path for variant in (None, "fp16") for path in sorted(folder.iterdir())
                     if weight_name(variant).fullmatch(path.name)]
            for path in reversed(found):
                with safe_open(path, framework="pt") as file:
                    names |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise UserError(Problem(f"the weights of {network} cannot be read", f"{self.repo.flag} {self.repo.path}",
                                    f"{error}", "name a complete model folder, its weights in safetensors",
                                    "data")) from error
        return names
