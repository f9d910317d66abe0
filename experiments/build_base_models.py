#!/usr/bin/env python3
"""Build the base models and the icon folders under assets/ from freely licensed emoji images.

Sources, fetched from npm and PyPI at pinned versions into the work folder:
  emoji-datasource-google 16.0.0      Noto Emoji images, Apache-2.0
  emoji-datasource-twitter 16.0.0     Twemoji images, CC-BY 4.0
  @iconify-json/fluent-emoji-flat     Fluent Emoji (flat), MIT
  @iconify-json/emojione 1.2.3        Emoji One 2, CC-BY 4.0: only for the UNets
  @iconify-json/fxemoji 1.2.2         Firefox OS Emoji, Apache-2.0: only for the UNets
  @iconify-json/noto-v1 1.2.5         Noto Emoji of 2017, Apache-2.0: only for the UNets
  @lobehub/fluent-emoji-3d 1.1.0      Fluent Emoji (3-D), MIT: only for assets/icons-3d*, never for the base
  open-clip-torch 3.3.0               CLIP's byte-pair merges, MIT

The shipped models were built before the three sets for the UNets were added, and have not seen them. The cards of
models that are built now must name these sets, too.

Every stage resumes where it was stopped; training state lives in the work folder.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import ROOT

STAGES = ("data", "tokenizer", "vae", "clip", "judge", "sdxl", "sd", "export", "icons", "cards")
MINUTES = {"vae": 11.0, "clip": 17.0, "judge": 15.0, "sdxl": 81.0, "sd": 25.0}


EXTRA_STAGES = ("start",)  # not part of "all"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage",
        choices=(*STAGES, *EXTRA_STAGES, "all"),
        default=None,
        help="what to build; all runs every stage; start begins a longer training at the shipped models",
    )
    parser.add_argument("--evaluate", action="store_true", help="measure the exported models, write cards and sheets")
    parser.add_argument("--minutes", type=float, default=None, help=f"training time of the stage, default {MINUTES}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "build", help="downloads and training state (git-ignored)"
    )
    parser.add_argument("--assets_dir", type=Path, default=ROOT / "assets")
    args = parser.parse_args(argv)
    if args.stage is None and not args.evaluate:
        parser.error("nothing to do: give --stage (one stage or all) or --evaluate")
    return args


def train(stage: str, args: argparse.Namespace) -> None:
    minutes = args.minutes or MINUTES[stage]
    if stage == "vae":
        from experiments.base_models.vae import train_vae

        train_vae(args.work_dir, minutes=minutes, seed=args.seed)
    elif stage == "clip":
        from experiments.base_models.clip import train_clip

        train_clip(args.work_dir, minutes=minutes, seed=args.seed)
    elif stage == "judge":
        from experiments.base_models.judge import train_judge

        train_judge(args.work_dir, minutes=minutes, seed=args.seed)
    else:
        from experiments.base_models.train_unets import train_unet

        train_unet(args.work_dir, stage, minutes=minutes, seed=args.seed)


def run_stage(stage: str, args: argparse.Namespace) -> None:
    if stage == "data":
        from experiments.base_models.data import build_icons

        build_icons(args.work_dir)
    elif stage == "tokenizer":
        from experiments.base_models.tokenizer import build_tokenizers

        build_tokenizers(args.work_dir)
    elif stage in MINUTES:
        train(stage, args)
    elif stage == "start":
        from experiments.base_models.start import start_from_assets

        start_from_assets(args.work_dir, args.assets_dir)
    elif stage == "export":
        from experiments.base_models.export import export_all

        export_all(args.work_dir, args.assets_dir)
    elif stage == "icons":
        from experiments.base_models.icon_folders import write_icon_folders

        write_icon_folders(args.work_dir, args.assets_dir)
    else:
        from experiments.base_models.cards import write_cards

        write_cards(args.work_dir, args.assets_dir)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    for stage in STAGES if args.stage == "all" else (args.stage,) if args.stage else ():
        run_stage(stage, args)
    if args.evaluate:
        from experiments.base_models.evaluate import evaluate_all

        evaluate_all(args.work_dir, args.assets_dir, seed=args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
