"""New words for a concept: tokens whose embeddings are trained while everything else in the text encoders stays.

An abstraction such as TOK stands for new tokens <s0><s1>… in prompts. Each text encoder gets K rows [K,D] beside its
token embedding, and these rows are all that is trained: the vocabulary is neither copied nor given a gradient.

    after every optimizer step that moved them      rows ← rows · (σ_vocabulary / σ_rows)^power      --token_std_pull

which keeps them as large as the words the encoder knows; σ is the standard deviation over all entries.

Sources: Gal et al. 2022, "An Image is Worth One Word", arXiv:2208.01618 (rows of new tokens); Roich et al. 2021,
"Pivotal Tuning for Latent-based Editing of Real Images", arXiv:2106.05744 (then the network); replicate/cog-sdxl and
huggingface/diffusers examples/advanced_diffusion_training (both for SDXL, the pull and its power 0.1).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainkit import lora_file, rng
from trainkit.errors import Problem, UserError, counted, refuse
from trainkit.families.tokenize import chunked, read_tokens
from trainkit.files import disk_errors, load_tensors, save_tensors
from trainkit.lora_file import start
from trainkit.reading import parse_json
from trainkit.runtime.weight_files import embeddings_file

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedModel

    from trainkit.data.batch import Row
    from trainkit.families.sdxl import SDXL
    from trainkit.optim import ParamGroup
    from trainkit.options import LoraOptions, PivotalOptions

log = logging.getLogger(__name__)

ENCODERS = ("clip_l", "clip_g")  # names of the rows in the file, in the order of the family's text encoders
EOS_LINE = "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id"  # where a file `sets_eos`
FIRST_STEP = 0.01  # of a word's usual size: what Prodigy starts from with embeddings, whose gradient is mostly noise
TOKENS, BASE, SETS_EOS = "tokens", "base_model", "sets_eos_token_id"  # keys of the file's header


# ----------------------------------------------------------------------------------------------------------------------
# Before loading


def problems(options: PivotalOptions, captions: Sequence[str]) -> Iterator[Problem]:
    """What keeps the new tokens from being learned; `captions` are those of the images of the concept."""
    if not options.train_text_encoder_ti:
        return
    words, flag = options.abstractions, f"--token_abstraction {options.token_abstraction}"
    if len(set(words)) < len(words) or not words:
        yield Problem("a word is listed twice" if words else "no word is listed", flag,
                      "each stands for new tokens of its own", "--token_abstraction TOK, or several: TOK,TOK2")
        return
    if len(options.concepts) != len(words):
        yield Problem(f"{len(options.concepts)} concepts for {len(words)} words",
                      f"--initializer_concept {options.initializer_concept}, {flag}",
                      "entry by entry they say what the new tokens start from",
                      "list as many; leave an entry empty for random embeddings, as in: dog,")
    idle = [word for word in words if not any(holds(options, caption, word) for caption in captions)]
    if idle and captions:
        yield Problem(f"no caption contains {' or '.join(idle)}", flag,
                      "the embeddings of a word that is in no caption and not in --instance_prompt learn nothing",
                      f"write it into captions or prompt: --instance_prompt \"a photo of {idle[0]}\"", kind="data")


def holds(options: PivotalOptions, caption: str, word: str) -> bool:
    """Whether the text encoders are shown a token of `word`: it is there as a whole word, or its token is."""
    return options.tokens[word][0] in options.rewrite(caption)


def warn(options: PivotalOptions, rows: Sequence[Row]) -> None:
    """Say in the log which captions of class images hold a word of the new tokens, and how many of the others none."""
    if not options.train_text_encoder_ti:
        return
    captions = [row.caption for row in rows if not row.is_class and row.repeat == 0]
    without = [c for c in captions if not any(holds(options, c, word) for word in options.abstractions)]
    if without:
        log.warning("%d of %d captions contain none of %s: they do not train the new tokens (%r for one)",
                    len(without), len(captions), ", ".join(options.abstractions), without[0])
    both = [row.caption for row in rows if row.is_class and options.rewrite(row.caption) != row.caption]
    if both:
        log.warning("%s a word of --token_abstraction: the new tokens learn the class "
                    "from it (%r for one)", counted(len(both), "caption of class images holds",
                                                    "captions of class images hold"), both[0])


# ----------------------------------------------------------------------------------------------------------------------
# The rows


class TokenRows(nn.Module):
    """A frozen token embedding [V,D] and, for ids from `first` on, rows of its own [K,D] in fp32.

    A look-up comes in the table's dtype, as it would from a table that had the rows at its end.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor, *, first: int):
        super().__init__()
        self.table, self.first = table, first
        self.new = nn.Embedding.from_pretrained(rows.float(), freeze=False)

    @property
    def rows(self) -> nn.Parameter:
        return self.new.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B,T] -> [B,T,D]"""
        is_new = ids >= self.first
        known = self.table(ids.masked_fill(is_new, 0))
        learned = self.new((ids - self.first).clamp(min=0)).to(known.dtype)
        return torch.where(is_new.unsqueeze(-1), learned, known)


class NewTokens:
    """The new tokens of a run in both text encoders: what is trained, and how prompts name it.

    Adds the tokens to the family's tokenizers and puts TokenRows around the token embeddings of its text encoders.
    lora  --network_weights names the file whose embeddings they start from
    seed  decides random rows together with a token's name, whatever other tokens there are
    Raises UserError where a tokenizer has one of the tokens already.
    """

    networks: tuple[()] = ()  # no adapters

    def __init__(self, family: SDXL, options: PivotalOptions, *, seed: int, lora: LoraOptions | None = None) -> None:
        self.options = options
        self.names = [name for names in options.tokens.values() for name in names]
        self.base_model, self.architecture, self.sets_eos = family.name, family.architecture, family.sets_eos
        refuse(taken(self.names, family.tokenizers))
        parts: list[tuple[str, Any, Any]] = list(zip(ENCODERS, family.tokenizers, family.text_encoders, strict=True))
        self.stds = [float(encoder.get_input_embeddings().weight.float().std()) for _, _, encoder in parts]
        self.rows: list[nn.Parameter] = []  # and no more of the encoders, which must be free to go at the pivot
        widths = {name: encoder.get_input_embeddings().weight.shape[1] for name, _, encoder in parts}
        given = start.embeddings(lora, family.names, {name: (len(self.names), D) for name, D in widths.items()})
        for (name, tokenizer, encoder), std in zip(parts, self.stds, strict=True):
            rows = given[name] if given else first_rows(
                options, tokenizer, encoder.get_input_embeddings().weight, std=std, key=(seed, name))
            self.rows.append(overlay(tokenizer, encoder, self.names, rows).rows)
        self.last = [rows.detach().clone() for rows in self.rows]  # as the last update left them

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """{"clip_l": [K,768], "clip_g": [K,1280]} in fp32, rows in the tokens' order."""
        return {name: rows.detach() for name, rows in zip(ENCODERS, self.rows, strict=True)}

    def rewrite(self, prompt: str) -> str:
        return self.options.rewrite(prompt)

    def learns_from(self, text: str) -> bool:
        """Whether a rewritten prompt reaches the rows at all."""
        return any(name in text for name in self.names)

    def groups(self, *, lrs: tuple[float, float], weight_decay: float, stop: int | None) -> list[ParamGroup]:
        """One group with the rows of both encoders, at the first rate."""
        return [{"name": "tokens", "params": list(self.rows), "lr": lrs[0],
                 "names": [f"{encoder}.token_embedding.new.weight" for encoder in ENCODERS],
                 "weight_decay": weight_decay, "stop": stop, "first_step": FIRST_STEP * min(self.stds)}]

    @torch.no_grad()
    def after_update(self) -> None:
        """Pull the rows' standard deviation towards the vocabulary's, where the update moved them: a rate of 0 is 0."""
        if self.options.token_std_pull == 0:
            return
        for rows, last, std in zip(self.rows, self.last, self.stds, strict=True):
            if not torch.equal(rows, last):
                rows.mul_((std / rows.std()) ** self.options.token_std_pull)
                last.copy_(rows)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        return self.embeddings, {"tokens": self.names}

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor], data: Mapping[str, object]) -> None:
        """Continue from `pack`'s answer. Raises UserError where it belongs to other tokens."""
        embeddings = self.embeddings
        if data.get("tokens") != self.names or {k: v.shape for k, v in embeddings.items()} != {
                k: v.shape for k, v in tensors.items()}:
            raise UserError(Problem(
                "the checkpoint holds other new tokens than this run", "--token_abstraction",
                f"the checkpoint's are {data.get('tokens')}, this run's {self.names}",
                "resume with the words and the number of tokens of the first run, or name a new --output_dir"))
        for (name, rows), last in zip(embeddings.items(), self.last, strict=True):
            rows.copy_(tensors[name])
            last.copy_(tensors[name])

    def export(self, folder: Path, name: str) -> list[Path]:
        """Write <name>_emb.safetensors into `folder` and read it back -> [its path]."""
        path = folder / embeddings_file(name)
        header = {TOKENS: json.dumps(self.options.tokens), BASE: self.base_model, SETS_EOS: str(self.sets_eos),
                  "modelspec.architecture": f"{self.architecture}/textual-inversion"}
        write_embeddings(path, self.embeddings, header)
        return [path]


def taken(names: Sequence[str], tokenizers: Sequence[CLIPTokenizer]) -> Iterator[Problem]:
    """New tokens that are not new: the base model has been taught tokens of these names before."""
    for tokenizer in tokenizers:
        known = [name for name in names if name in tokenizer.get_vocab()]
        if known:
            yield Problem(f"the base model has the tokens {', '.join(known)} already", "--train_text_encoder_ti",
                          "its tokenizers were saved with tokens of an earlier training, and two meanings of one token "
                          "cannot be told apart", "name the base model that the earlier training started from")
            return


def unseen(names: Sequence[str], tokenizer: CLIPTokenizer, texts: Sequence[str], max_chunks: int = 1) -> list[Problem]:
    """New tokens that no rewritten prompt shows the encoders, because it is cut before them."""
    shown = set(chunked([tokenizer], texts, max_chunks).ids[0].flatten().tolist()) if texts else set()
    lost = [name for name in names if tokenizer.convert_tokens_to_ids(name) not in shown]
    if not lost:
        return []
    listed = ", ".join(lost[:4]) + (", …" if len(lost) > 4 else "")
    return [Problem(f"{len(lost)} of {len(names)} new tokens are cut off in every caption ({listed})",
                    "--token_abstraction, --num_new_tokens_per_abstraction",
                    f"text encoders read {read_tokens(tokenizer, max_chunks)} tokens, and those beyond learn nothing",
                    "write the word near the start of captions, or give it fewer tokens", kind="data")]


def first_rows(options: PivotalOptions, tokenizer: CLIPTokenizer, table: Tensor, *, std: float,
               key: rng.Key) -> Tensor:
    """The embeddings that training starts from, abstraction by abstraction -> [K,D] fp32."""
    rows = []
    for concept, names in zip(options.concepts, options.tokens.values(), strict=True):
        random = [std * rng.normal((table.shape[1],), [(*key, name)], name="token")[0] for name in names]
        rows += rows_of(concept, tokenizer, table, n=len(names)) if concept else random
    return torch.stack(rows)


def rows_of(concept: str, tokenizer: CLIPTokenizer, table: Tensor, *, n: int) -> list[Tensor]:
    """n embeddings that say `concept`, in fp32 on the CPU.

    Row i is token i of the concept, and the tokens start again when there are fewer than rows. When there are more,
    they are cut into n runs of neighbours, and a row is the mean of its run.
    """
    known = table[tokenizer(concept, add_special_tokens=False).input_ids].detach().float().cpu()  # [tokens, D]
    if len(known) <= n:
        return [known[i % len(known)] for i in range(n)]
    return [run.mean(dim=0) for run in known.tensor_split(n)]


def overlay(tokenizer: CLIPTokenizer, encoder: PreTrainedModel, names: Sequence[str], rows: Tensor) -> TokenRows:
    """Teach a tokenizer the names and its encoder the rows."""
    tokenizer.add_tokens(list(names))
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert ids == list(range(ids[0], ids[0] + len(names))), "new tokens follow one another"
    table = encoder.get_input_embeddings()
    part = TokenRows(table, rows.to(table.weight.device), first=ids[0])
    encoder.set_input_embeddings(part)
    return part


# ----------------------------------------------------------------------------------------------------------------------
# The file


@dataclass(frozen=True)
class EmbeddingsHeader:
    """What a file of embeddings says about itself."""

    tokens: dict[str, list[str]]  # abstraction -> its tokens, in the order of the rows
    sets_eos: bool  # trained with the pooled vector at the end token, against the base model's config

    @property
    def names(self) -> list[str]:
        """All tokens, in the order of the rows."""
        return [name for names in self.tokens.values() for name in names]


def write_embeddings(path: Path, embeddings: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """A file that Diffusers (by two calls), ComfyUI and WebUIs load; read back and compared.

    Raises UserError(kind="disk") when it cannot be written or does not hold what it should.
    """
    with disk_errors(path):
        save_tensors(path, embeddings, {"format": "pt", **header})
    read = load_tensors(path)
    if read.keys() != embeddings.keys() or not all(torch.equal(read[k], v.cpu()) for k, v in embeddings.items()):
        raise UserError(Problem(f"{path.name} does not hold the trained embeddings", str(path),
                                "what was read back differs", "check the disk, then --resume_from_checkpoint latest "
                                "writes it again", kind="disk"))


def read_header(path: Path) -> EmbeddingsHeader:
    """The header of a file of embeddings; of another program's file, tokens <s0>… that stand for no word."""
    header = lora_file.read_header(path)
    count, said = header.shapes[ENCODERS[0]][0], header.metadata
    tokens = parse_json(said[TOKENS]) if TOKENS in said else {"": [f"<s{k}>" for k in range(count)]}
    return EmbeddingsHeader(tokens, said.get(SETS_EOS) == "True")
