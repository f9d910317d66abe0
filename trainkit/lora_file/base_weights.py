"""Weights of a base model one at a time, from its files: a DoRA's update depends on them, and no network is built."""

from __future__ import annotations

from torch import Tensor

from trainkit.errors import Problem, UserError
from trainkit.families.file_names import TEXT_MODEL, ModulePlace
from trainkit.families.pretrained import Repo


class BaseWeights:
    """place -> W [out,in] in fp64, a convolution's kernel in a row; of a folder, a single file, or a fetched Hub model.

    UserError: the model has no such module, or no weights in safetensors.
    """

    def __init__(self, repo: Repo):
        self.repo = repo

    def __call__(self, place: ModulePlace) -> Tensor:
        from safetensors import SafetensorError

        network, path = place
        try:
            held = [self.repo.weight(network, f"{start}{path}.weight") for start in ("", TEXT_MODEL)]
        except (OSError, SafetensorError) as error:
            raise UserError(Problem(f"the weights of {network} cannot be read", f"{self.repo.flag} {self.repo.path}",
                                    f"{error}", "name a complete base model, its weights in safetensors",
                                    "data")) from error
        found = next((tensor for tensor in held if tensor is not None), None)
        if found is None:
            raise UserError(self.repo.problem(f"the base model has no module {path} in its {network}",
                                              "the LoRA was trained on another one", "name it with --base",
                                              kind="data"))
        return found.double().flatten(1)
