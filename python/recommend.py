"""Train a recommender, say how good it is and for whom, and recommend."""

import sys

from lspm_models.options import Parser, errors_in_one_line, given

with errors_in_one_line("recommend.py"):  # what comes in with these may not be installed
    import torch

    from lspm_models.recommender_job import EXAMPLES, TRAINING, job_of, load_recommender
    from lspm_models.recommender_outputs import Evaluation, Recommending, recommendations, report_quality
    from lspm_models.scripts import opened_run, training_parser

EVALUATING = """\
Say how good a trained recommender is on the ratings set aside: errors, the ranking of the whole catalogue,
and how groups of users fare. The run folder gets metrics.json, groups.csv and groups.png."""

RECOMMENDING = """\
Recommend to a user of the data, by title. In brackets stands what holds without the option."""

HELP = f"""\
python python/recommend.py COMMAND [options]

Train a recommender, say how good it is and for whom, and recommend.

commands:
  train      train on MovieLens-100k, or on your own ratings
  evaluate   say how good it is, and for whom
  recommend  what a user may like, by title

examples
  python python/{EXAMPLES[0]}
  python python/recommend.py evaluate runs/films
  python python/recommend.py recommend runs/films --user 196

python python/recommend.py COMMAND --help tells of the options.
"""


def train(arguments: list[str]) -> int:
    with errors_in_one_line("recommend.py train"):
        job = job_of(arguments)
    parser = named(training_parser(TRAINING, EXAMPLES), "train", "[options]")
    job.add_options(parser)
    with errors_in_one_line(parser.prog), opened_run(parser.parse_args(arguments), print, job) as run:
        return job.train(parser.prog, run)


OUTPUTS = {
    "evaluate": (EVALUATING, Evaluation, report_quality),
    "recommend": (RECOMMENDING, Recommending, recommendations),
}


def with_run(command: str, arguments: list[str]) -> int:
    description, config, function = OUTPUTS[command]
    example = f"recommend.py {command} runs/films" + " --user 196 --count 5" * (command == "recommend")
    parser = named(Parser(description, [example]), command, "RUN [options]")
    parser.run.add_argument("folder", metavar="RUN", help="run folder, or one checkpoint in it")
    parser.add_config("output", config)
    options = parser.parse_args(arguments)
    with errors_in_one_line(parser.prog):
        output = config(**given(options, {"output": config})["output"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        function(load_recommender(options.folder, device), output, print)
    return 0


def named(parser: Parser, command: str, usage: str) -> Parser:
    parser.prog, parser.usage = f"recommend.py {command}", f"python python/recommend.py {command} {usage}"
    return parser


def main() -> int:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "train":
        return train(arguments)
    if command in OUTPUTS:
        return with_run(command, arguments)
    if command in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    Parser("", []).error(f"command must be train, {' or '.join(OUTPUTS)}, got {command!r}")


if __name__ == "__main__":
    sys.exit(main())
