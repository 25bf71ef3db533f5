"""Say what a model that pretrain.py or finetune.py made sees in image files."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from lspm_models.options import Parser, errors_in_one_line, given

with errors_in_one_line("predict.py"):  # what comes in with these may not be installed
    import torch

    from lspm_models.data.image_files import decode
    from lspm_models.image_job import load_image_model
    from lspm_models.image_outputs import most_probable

DESCRIPTION = """\
Say what is on images: the most probable classes, each with its probability. In brackets stands what holds
without the option."""

EXAMPLES = ["predict.py runs/fashion shoe.png", "predict.py runs/photos *.jpg --top 1"]


@dataclass(frozen=True)
class Output:
    top: int = field(default=5, metadata={"help": "classes per image at most"})

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"output: top must be at least 1, got {self.top}")


def main() -> int:
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.usage = parser.usage.replace("[options]", "RUN IMAGE... [options]")
    parser.run.add_argument("folder", metavar="RUN", help="run folder, or one checkpoint in it")
    parser.run.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_config("output", Output)
    arguments = parser.parse_args()
    unread = 0
    with errors_in_one_line(parser.prog):
        top = Output(**given(arguments, {"output": Output})["output"]).top
        device = "cuda" if torch.cuda.is_available() else "cpu"
        task, look = load_image_model(arguments.folder, device)
        for name in arguments.images:
            try:
                pixels = torch.from_numpy(decode(Path(name), look.channels, look.size).copy())
            except ValueError as error:
                sys.stderr.write(f"{parser.prog}: {name}: {error}\n")
                unread += 1
                continue
            with torch.no_grad():
                logits = task(look.normalised(pixels[None]).to(device))
            found = most_probable(logits, look.classes, top)[0]
            print(name, "  ".join(f"{label} {probability:.1%}" for label, probability in found), sep="   ")
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
