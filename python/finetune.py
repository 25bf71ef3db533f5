"""Fine-tune a GPT that pretrain.py made on another text."""

import sys
from dataclasses import asdict
from pathlib import Path

from lspm_models.files import write_atomically
from lspm_models.options import errors_in_one_line

with errors_in_one_line("finetune.py"):  # what comes in with these may not be installed
    from lspm_models.checkpoint import checkpoints, load_weights, refuse_mismatch
    from lspm_models.data.text import TextConfig
    from lspm_models.fit_config import FitConfig
    from lspm_models.run_folder import find_checkpoint, read_model_config, tokenizer_path
    from lspm_models.scripts import opened_run, train, training_parser

DESCRIPTION = """\
Fine-tune a GPT on another text: the same loop as pretrain.py, beginning with the weights and the tokenizer
of a checkpoint. In brackets stands what holds without the option."""

EXAMPLES = [
    "finetune.py --init runs/demo --corpus shakespeare --steps 200 --out runs/bard",
    "finetune.py --resume runs/bard",
]
DEFAULTS = {"learning_rate": 1e-4}
TOKENIZER = ("tokenizer", "vocabulary_size", "tokenizer_sample")


def main() -> int:
    parser = training_parser(DESCRIPTION, EXAMPLES)
    parser.run.add_argument(
        "--init", metavar="FOLDER", help="run folder, or one checkpoint in it, to begin with"
    )
    parser.add_config("text", TextConfig, skip=TOKENIZER)
    parser.add_config("training", FitConfig, DEFAULTS)
    arguments = parser.parse_args()
    if ("init" in arguments) == ("resume" in arguments):
        parser.error("give either --init FOLDER to begin or --resume FOLDER to continue")
    with errors_in_one_line(parser.prog):
        init, defaults = None, {}
        if "init" in arguments:
            init = find_checkpoint(arguments.init).resolve()
            shape = asdict(read_model_config(init))
            shape.pop("vocabulary_size")  # the tokenizer's
            defaults = {"model": shape, "training": DEFAULTS}
        with opened_run(arguments, print, init=init and str(init), defaults=defaults) as run:
            init = Path(run.init)
            if "init" in arguments:
                refuse_mismatch({"model": shape}, {"model": asdict(run.model)}, str(init), {"model.dropout"})
                write_atomically(run.folder / "tokenizer.json", tokenizer_path(init).read_bytes())
            tokenizer, tokens = run.text()
            task, data = run.task(tokenizer.vocabulary_size), run.blocks(tokens)
            if not checkpoints(run.folder / "checkpoints"):
                load_weights(init, task)
    return train(parser.prog, run, task, data)


if __name__ == "__main__":
    sys.exit(main())
