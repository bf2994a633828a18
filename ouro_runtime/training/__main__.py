"""`python -m ouro_runtime.training`: trains and exports `ouro-mini`; see `--help`."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer

from ouro_runtime.training.recipe import CONTINUED, SHARED, Recipe, corpus
from ouro_runtime.training.stage1 import Budget, Stage1
from ouro_runtime.training.tokenizer import train_tokenizer

TOKENIZER = Path(__file__).resolve().parent.parent / "checkpoints/ouro-mini/tokenizer.json"
"""The shipped tokenizer: kept as it is, because what is served with it depends on its ids."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="ouro_runtime.training", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/ouro-mini"), help="saves and exports")
    p.add_argument("--stage", choices=("1", "2", "all"), default="all")
    p.add_argument("--minutes", type=float, help="training time of stage 1 (default 70)")
    p.add_argument("--steps", type=int, help="steps of stage 1, instead of --minutes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--init", type=Path, help="start from this checkpoint: a later leg")
    p.add_argument("--shared", action="store_true", help="train mode `shared` too: the third leg")
    p.add_argument("--resume", action="store_true", help="go on from the last save in --out")
    p.add_argument("--new-tokenizer", action="store_true", help="train one, not the shipped one")
    p.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    p.add_argument("--export", type=Path, help="checkpoint folder (default: OUT/export)")
    args = p.parse_args(argv)
    if args.shared and args.init is None:
        p.error("--shared: needs --init, the second leg's checkpoint")
    if args.steps is None and args.minutes is None:
        args.minutes = 70.0
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    recipe = SHARED if args.shared else CONTINUED if args.init else Recipe()
    recipe = replace(recipe, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save = args.out / "stage1.pt"
    if args.stage in ("1", "all"):
        if args.new_tokenizer or not TOKENIZER.exists():
            tok = train_tokenizer(corpus(recipe), recipe.vocab_size)
        else:
            tok = Tokenizer.from_file(str(TOKENIZER))
        tok.save(str(args.out / "tokenizer.json"))
        trainer = Stage1(recipe, tok, device)
        if args.resume and save.exists():
            trainer.load(save)
        elif args.init:
            trainer.begin_from(args.init)
        if not args.no_compile:
            trainer.model.compile()
        trainer.run(Budget(args.steps, args.minutes), save)
    if args.stage in ("2", "all"):
        from ouro_runtime.training.finish import finish

        tok = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        trainer = Stage1(recipe, tok, device)
        trainer.load(save)
        finish(trainer, args.out, args.export or args.out / "export")


if __name__ == "__main__":
    main()
