"""Let a model that pretrain.py or finetune.py made continue a text."""

import signal
import sys
from dataclasses import asdict, dataclass, field

from lspm_models.options import Parser, errors_in_one_line, given
from lspm_models.outputs import Transcript

with errors_in_one_line("generate.py"):  # what comes in with these may not be installed
    import torch

    from lspm_models.generate import generate
    from lspm_models.run_folder import load_model_folder

DESCRIPTION = """\
Let a model continue a text. The first continuation appears as it is made, others when all are done.
In brackets stands what holds without the option."""

EXAMPLES = [
    'generate.py runs/demo --prompt "def " --sequences 3 --seed 1',
    "generate.py runs/demo --prompt 'import ' --greedy --stop $'\\n\\n'",
    "generate.py runs/demo --prompt - --tokens 400 < beginning.txt",
]


def option(value, text: str, **metadata):
    return field(default=value, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class Text:
    prompt: str | None = option(
        None, "text to continue; - reads standard input", default="begin a new text", metavar="TEXT"
    )
    tokens: int = option(200, "most tokens to add")
    sequences: int = option(1, "continuations to make")
    stop: str | None = option(None, "end before this text", default="where the model ends", metavar="TEXT")


@dataclass(frozen=True)
class Sampling:
    temperature: float = option(0.8, "below 1, probable tokens come more often than the model says")
    top_k: int | None = option(None, "choose among so many of the most probable tokens", default="all")
    top_p: float | None = option(None, "choose among the most probable that sum to this", default="1")
    seed: int | None = option(None, "the same seed gives the same text", default="a new one each time")


def main() -> int:
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.usage = parser.usage.replace("[options]", "RUN [options]")
    parser.run.add_argument("folder", metavar="RUN", help="run folder, or one checkpoint in it")
    parser.run.add_argument("--greedy", action="store_true", help="always the most probable token")
    parser.add_config("text", Text)
    parser.add_config("sampling", Sampling)
    arguments = parser.parse_args()
    options = given(arguments, {"text": Text, "sampling": Sampling})
    sampling = asdict(Sampling(**options["sampling"]))
    if "greedy" in arguments:
        sampling["temperature"] = 0.0
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    for name in {"SIGINT", "SIGPIPE"} & set(dir(signal)):  # Ctrl-C, or `| head`: end without a traceback
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    with errors_in_one_line(parser.prog):
        write(arguments.folder, Text(**options["text"]), sampling)
    return 0


def write(folder: str, text: Text, sampling: dict) -> None:
    task, tokenizer = load_model_folder(folder, "cuda" if torch.cuda.is_available() else "cpu")
    prompt = sys.stdin.read().removesuffix("\n") if text.prompt == "-" else text.prompt
    tokens = [tokenizer.end_of_text] if prompt is None else tokenizer.encode(prompt)
    transcript = Transcript(sys.stdout, prompt or "", text.sequences, tokenizer.decode, text.stop)
    sampling |= {"sequences": text.sequences, "stop": tokenizer.end_of_text}
    generate(task, tokens, max_new_tokens=text.tokens, stream=transcript.push, **sampling)
    transcript.finish()


if __name__ == "__main__":
    sys.exit(main())
