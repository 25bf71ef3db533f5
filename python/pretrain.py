"""Pretrain a GPT on text: files, folders, or a corpus that is on this machine already."""

import sys

from lspm_models.options import errors_in_one_line

with errors_in_one_line("pretrain.py"):  # what comes in with these may not be installed
    from lspm_models.data.text import TextConfig
    from lspm_models.fit_config import FitConfig
    from lspm_models.run_folder import ModelConfig
    from lspm_models.scripts import opened_run, train, training_parser

DESCRIPTION = """\
Pretrain a GPT on text. Without any option it learns from the source text of Python's standard library.
The run folder gets the tokenizer, checkpoints, log.csv, loss.png and TensorBoard events; Ctrl-C saves first.
In brackets stands what holds without the option."""

EXAMPLES = [
    "pretrain.py --minutes 3 --out runs/demo",
    "pretrain.py --corpus notes.txt letters/ --tokenizer character --layers 2 --width 128",
    "pretrain.py --config python/configs/gpt_tiny.toml --learning-rate 3e-4",
    "pretrain.py --resume runs/demo --minutes 6",
]


def main() -> int:
    parser = training_parser(DESCRIPTION, EXAMPLES)
    parser.add_config("text", TextConfig)
    parser.add_config("model", ModelConfig)
    parser.add_config("training", FitConfig)
    arguments = parser.parse_args()
    with errors_in_one_line(parser.prog), opened_run(arguments, print) as run:
        tokenizer, tokens = run.text()
        task, data = run.task(tokenizer.vocabulary_size), run.blocks(tokens)
    return train(parser.prog, run, task, data)


if __name__ == "__main__":
    sys.exit(main())
