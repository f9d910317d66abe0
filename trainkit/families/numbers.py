"""What the values of a model's configs may be: a damaged or made-up one is named before it breaks anything.

A table for each file, by key. The bounds are far from every model there is; they keep out what trains on nothing, runs
a machine out of memory, or ends in a traceback. Keys that no table has are of other versions and read by nobody.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LONGEST_LIST = 64  # blocks of a network
LONGEST_SCHEDULE = 100_000  # timesteps
SHOWN_CHARACTERS = 60  # of a value in a message


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, and where a list of them may stand, each in it, and in lists in it.

    above    `low` itself is none of them
    whole    no fractions
    listed   lists may stand there
    null     so may nothing
    """

    low: float
    high: float
    above: bool = False
    whole: bool = False
    listed: bool = False
    null: bool = True
    longest: int = LONGEST_LIST

    def takes(self, value: object) -> bool:
        if value is None:
            return self.null
        if isinstance(value, list):
            return self.listed and 0 < len(value) <= self.longest and all(map(self._inner, value))
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or value != value:  # NaN
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def _inner(self, value: object) -> bool:
        return value is not None and self.takes(value)

    @property
    def words(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        kind = f"{kind}, alone or listed" if self.listed else f"a {kind[:-1]}"
        return f"{kind}, {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Switch:
    """true or false."""

    words = "true or false"

    def takes(self, value: object) -> bool:
        return value is None or isinstance(value, bool) or (isinstance(value, list) and all(map(self.takes, value)))


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    choices: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def takes(self, value: object) -> bool:
        return value is None or value in self.choices


Table = Mapping[str, Number | Switch | OneOf]


def count(high: int, low: int = 1, *, listed: bool = False, null: bool = True) -> Number:
    return Number(low, high, whole=True, listed=listed, null=null)


def table(*tables: Mapping[str, Number | Switch | OneOf]) -> Table:
    return {key: rule for one in tables for key, rule in one.items()}


def all_of(rule: Number | Switch | OneOf, names: str) -> Table:
    return dict.fromkeys(names.split(), rule)


CHANNELS, LAYERS, HEADS = 2**15, 256, 4096
EPSILON, FRACTION = Number(0, 1, above=True), Number(0, 1)
POSITIVE = Number(0, 1e4, above=True)

UNET = table(
    all_of(count(1024, null=False), "in_channels out_channels"),
    all_of(count(CHANNELS, listed=True, null=False), "block_out_channels"),
    all_of(count(CHANNELS, listed=True), "cross_attention_dim sample_size"),
    all_of(count(LAYERS, listed=True), "layers_per_block"),
    all_of(count(LAYERS, 0, listed=True), "transformer_layers_per_block reverse_transformer_layers_per_block"),
    all_of(count(HEADS, listed=True), "attention_head_dim num_attention_heads"),
    all_of(count(HEADS), "norm_num_groups addition_embed_type_num_heads"),
    all_of(count(2**17), "addition_time_embed_dim projection_class_embeddings_input_dim time_embedding_dim "
           "time_cond_proj_dim encoder_hid_dim num_class_embeds"),
    all_of(count(64), "conv_in_kernel conv_out_kernel"), all_of(count(16, 0), "downsample_padding"),
    {"norm_eps": EPSILON, "dropout": FRACTION, "freq_shift": Number(-1e4, 1e4)},
    all_of(POSITIVE, "mid_block_scale_factor resnet_out_scale_factor"),
    all_of(Switch(), "center_input_sample flip_sin_to_cos only_cross_attention dual_cross_attention upcast_attention "
           "use_linear_projection resnet_skip_time_act class_embeddings_concat mid_block_only_cross_attention"),
)
VAE = table(
    all_of(count(3, 3, null=False), "in_channels out_channels"),  # of pixels: red, green, blue
    all_of(count(1024, null=False), "latent_channels"),
    all_of(count(CHANNELS, listed=True, null=False), "block_out_channels"), all_of(count(LAYERS), "layers_per_block"),
    all_of(count(CHANNELS, listed=True), "sample_size"), all_of(count(HEADS), "norm_num_groups"),
    {"scaling_factor": Number(1e-6, 1e4, null=False), "shift_factor": Number(-1e4, 1e4),
     "latents_mean": Number(-1e4, 1e4, listed=True, longest=1024),
     "latents_std": Number(1e-6, 1e4, listed=True, longest=1024)},
    all_of(Switch(), "force_upcast use_quant_conv use_post_quant_conv mid_block_add_attention"),
)
TEXT_ENCODER = table(
    all_of(count(2**24, null=False), "vocab_size"), all_of(count(LAYERS, null=False), "num_hidden_layers"),
    all_of(count(2**16, null=False), "hidden_size intermediate_size projection_dim max_position_embeddings"),
    all_of(count(HEADS, null=False), "num_attention_heads"), {"layer_norm_eps": EPSILON},
    all_of(FRACTION, "dropout attention_dropout"), all_of(Number(0, 1e4), "initializer_range initializer_factor"),
    all_of(count(2**24, -1, listed=True), "pad_token_id bos_token_id eos_token_id"),
)
SCHEDULER = table(
    all_of(count(LONGEST_SCHEDULE, 50, null=False), "num_train_timesteps"),
    all_of(Number(1e-8, 1 - 1e-8, null=False), "beta_start beta_end"),
    {"trained_betas": Number(1e-8, 1 - 1e-8, listed=True, longest=LONGEST_SCHEDULE)},
    all_of(Number(0, 1e6, above=True), "sigma_min sigma_max sigma_data rho flow_shift sample_max_value "
           "clip_sample_range"),
    {"dynamic_thresholding_ratio": FRACTION, "steps_offset": count(1000, 0), "solver_order": count(3),
     "lambda_min_clipped": Number(-math.inf, 1e4), "timestep_spacing": OneOf(("linspace", "leading", "trailing"))},
    all_of(Switch(), "rescale_betas_zero_snr clip_sample thresholding set_alpha_to_one skip_prk_steps "
           "use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas lower_order_final euler_at_final"),
)
TOKENIZER: Table = {}  # its length is asked for beside that of its encoder


def wrong_values(config: Mapping[str, object], rules: Table) -> Iterator[tuple[str, str, str]]:
    """(key, its value, what it takes) of each value that cannot be right; under an unknown key, numbers are finite."""
    for key, value in config.items():
        rule = rules.get(key)
        if rule is not None and not rule.takes(value):
            yield key, shown(value), rule.words
        elif rule is None and not _finite(value):
            yield key, shown(value), "finite numbers"


def _finite(value: object) -> bool:
    """Whether all numbers in a JSON value are; reading has bounded its depth."""
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
