"""Say what a model that pretrain.py or finetune.py made sees in image files."""

import sys
from pathlib import Path

from lspm_models.options import Parser, errors_in_one_line, given

with errors_in_one_line("predict.py"):  # what comes in with these may not be installed
    import torch

    from lspm_models.predictors import Output, load_predictor

DESCRIPTION = """\
Say what is on images. A ResNet: the most probable classes, each with its probability. A U-Net: the share of
each class, and a picture with its pixels in colour. A detector: each object with its score and its box, left,
upper, right and lower side in pixels, and a picture with the boxes. In brackets stands what holds without the
option."""

EXAMPLES = [
    "predict.py runs/fashion shoe.png",
    "predict.py runs/photos *.jpg --top 1",
    "predict.py runs/detector street.jpg --score 0.6 --pictures found/",
]


def main() -> int:
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.usage = parser.usage.replace("[options]", "RUN IMAGE... [options]")
    parser.run.add_argument("folder", metavar="RUN", help="run folder, or one checkpoint in it")
    parser.run.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_config("output", Output)
    arguments = parser.parse_args()
    unread = 0
    with errors_in_one_line(parser.prog):
        output = Output(**given(arguments, {"output": Output})["output"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        predictor = load_predictor(arguments.folder, device, output)
        for name in arguments.images:
            try:
                found = predictor(Path(name))
            except ValueError as error:
                sys.stderr.write(f"{parser.prog}: {name}: {error}\n")
                unread += 1
                continue
            print(name, found, sep="   ")
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
