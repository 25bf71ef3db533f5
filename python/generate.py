"""Let a language model continue a text or answer: of a run, of Hugging Face's folder, or of a GGUF file."""

import signal
import sys
from dataclasses import asdict

from lspm_models.options import Parser, errors_in_one_line, given, standard_input
from lspm_models.outputs import Transcript
from lspm_models.text_options import Sampling, Text

with errors_in_one_line("generate.py"):  # what comes in with these may not be installed
    import torch

    from lspm_models.couplets import write_couplets
    from lspm_models.data.tokenizers import Unmarked
    from lspm_models.generate import generate
    from lspm_models.sources import WEIGHTS, load_language_model

DESCRIPTION = """\
Let a model continue a text. The first continuation appears as it is made, others when all are done.
In brackets stands what holds without the option."""

EXAMPLES = [
    'generate.py runs/demo --prompt "def " --sequences 3 --seed 1',
    "generate.py runs/demo --prompt 'import ' --greedy --stop $'\\n\\n'",
    "generate.py runs/demo --prompt - --tokens 400 < beginning.txt",
    "generate.py runs/demo --prompt 'class ' --weights int8",
    "generate.py runs/tang --couplets 2 --prompt 床前明月光 --sequences 10",
    "generate.py SmolLM2-135M-Instruct.Q4_1.gguf --chat 'What is the capital of Italy?' --greedy",
]


def main() -> int:
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.usage = parser.usage.replace("[options]", "MODEL [options]")
    help = "run folder, one checkpoint in it, Hugging Face folder, or GGUF file"
    parser.run.add_argument("source", metavar="MODEL", help=help)
    parser.run.add_argument("--greedy", action="store_true", help="always the most probable token")
    help = "of linear layers: fewer bits are faster and less exact  [float32]"
    parser.run.add_argument("--weights", choices=tuple(WEIGHTS), default="float32", help=help)
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
        write(arguments.source, arguments.weights, Text(**options["text"]), sampling)
    return 0


def write(source: str, weights: str, text: Text, sampling: dict) -> None:
    task, tokenizer = load_language_model(source, "cuda" if torch.cuda.is_available() else "cpu")
    task.read_only_(*WEIGHTS[weights])
    sampling |= {"sequences": text.sequences, "stop": tokenizer.stops}
    prompt = text.prompt
    if prompt == "-":
        prompt = standard_input("--prompt").read().removesuffix("\n")
    if text.couplets is not None:
        write_couplets(sys.stdout, task, tokenizer, prompt or "", text.couplets, text.tokens, sampling)
        return
    if text.chat is not None:
        tokens = tokenizer.chat(text.chat, text.system)
    else:
        prompt, sampling["first"] = (None, ()) if prompt is None else tokenizer.healed(prompt)
        tokens = tokenizer.prompt(prompt)
        if prompt is not None and isinstance(tokenizer, Unmarked) and 0 < len(tokens) < task.config.context:
            tokens = [tokenizer.end_of_text, *tokens]  # which the texts of its training stood behind
    transcript = Transcript(sys.stdout, prompt or "", text.sequences, tokenizer.decode, text.stop)
    generate(task, tokens, max_new_tokens=text.tokens, stream=transcript.push, **sampling)
    transcript.finish()


if __name__ == "__main__":
    sys.exit(main())
