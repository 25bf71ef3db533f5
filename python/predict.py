"""Say what a model that pretrain.py or finetune.py made sees in image files, in texts or in their gaps."""

import sys
from collections.abc import Iterable, Iterator

from lspm_models.options import Parser, errors_in_one_line, given, standard_input

with errors_in_one_line("predict.py"):  # what comes in with these may not be installed
    import torch

    from lspm_models.encoder_outputs import filled, similarities
    from lspm_models.predictors import Output, load_predictor
    from lspm_models.sequence_models import task_in

DESCRIPTION = """\
Say what is on images or in texts. A classifier of either: the most probable classes, each with its
probability. A model of question answering: the part of each text that answers --question, with its
probability. A U-Net: the share of each class, and a picture with its pixels in colour. A detector: each
object with its score and its box, left, upper, right and lower side in pixels, and a picture with the boxes.
A BERT: what may stand where a text says [MASK], or how near texts lie to each other. In brackets stands what
holds without the option."""

EXAMPLES = [
    "predict.py runs/fashion shoe.png",
    "predict.py runs/photos *.jpg --top 1",
    "predict.py runs/detector street.jpg --score 0.6 --pictures found/",
    "predict.py runs/sentiment --text 'What a book!'",
    "predict.py runs/answers --text 'Ann lives in Rome.' --question 'Where does Ann live?'",
    "predict.py runs/bert --text 'return [MASK]' --top 3",
    "predict.py all-MiniLM-L6-v2/ --similarity --text 'A man eats.' 'A man has a meal.' 'It rains.'",
]


def main() -> int:
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.usage = parser.usage.replace("[options]", "RUN [IMAGE...] [options]")
    help = "run folder, or one checkpoint in it; of a BERT, Hugging Face's folder too"
    parser.run.add_argument("folder", metavar="RUN", help=help)
    parser.run.add_argument("images", metavar="IMAGE", nargs="*", default=[], help="image files")
    parser.add_config("output", Output)
    arguments = parser.parse_args()
    unread = 0
    with errors_in_one_line(parser.prog):
        output = Output(**given(arguments, {"output": Output})["output"])
        if bool(arguments.images) == bool(output.text):
            parser.error("give image files, or texts behind --text" + ", not both" * bool(output.text))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if output.text and not task_in(arguments.folder):
            return read(arguments.folder, output, device)
        predictor = load_predictor(arguments.folder, device, output)
        for name in lines(output.text) if output.text else arguments.images:
            try:
                print(name, predictor(name), sep="   ")
            except ValueError as error:
                sys.stderr.write(f"{parser.prog}: {name}: {error}\n")
                unread += 1
    return 1 if unread else 0


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields texts, and for - the lines of standard input."""
    for text in texts:
        yield from (line.rstrip("\r\n") for line in standard_input("--text")) if text == "-" else [text]


def read(folder: str, output: Output, device: str) -> int:
    if output.question is not None:
        raise ValueError(f"output: question must have a model that answers, got {output.question!r}")
    if output.similarity:
        lines = similarities(folder, output.text, device)
    else:
        lines = filled(folder, output.text, output.top, device)
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
