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

RECOMMENDING = "Recommend to a user of the data, by title. In brackets stands what holds without the option."

OUTPUTS = {
    "evaluate": (EVALUATING, Evaluation, report_quality),
    "recommend": (RECOMMENDING, Recommending, recommendations),
}
OUTPUT_EXAMPLES = {
    "evaluate": ["recommend.py evaluate runs/films"],
    "recommend": ["recommend.py recommend runs/films --user 196"],
}
HELP = f"""\
python python/recommend.py COMMAND [options]

Train a recommender, say how good it is and for whom, and recommend.

commands:
  train      learn MovieLens-100k, or your own ratings
  evaluate   say how good it is, and for whom
  recommend  what a user may like, by title

examples
  python python/{EXAMPLES[0]}
  python python/{OUTPUT_EXAMPLES["evaluate"][0]}
  python python/{OUTPUT_EXAMPLES["recommend"][0]}

python python/recommend.py COMMAND --help tells of the options.
"""


def train(parser: Parser, arguments: list[str], job) -> int:
    job.add_options(parser)
    with errors_in_one_line(parser.prog), opened_run(parser.parse_args(arguments), print, job) as run:
        return job.train(parser.prog, run)


def say(parser: Parser, arguments: list[str], config: type, function) -> int:
    parser.run.add_argument("folder", metavar="RUN", help="run folder, or one checkpoint in it")
    parser.add_config("output", config)
    options = parser.parse_args(arguments)
    with errors_in_one_line(parser.prog):
        output = config(**given(options, {"output": config})["output"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        function(load_recommender(options.folder, device), output, print)
    return 0


def main() -> int:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if command == "train":
        with errors_in_one_line("recommend.py train"):
            job = job_of(arguments)
        return train(training_parser(TRAINING, EXAMPLES, command), arguments, job)
    if command not in OUTPUTS:
        Parser("", []).error(f"command must be train, evaluate or recommend, got {command!r}")
    description, *rest = OUTPUTS[command]
    return say(Parser(description, OUTPUT_EXAMPLES[command], f"{command} RUN"), arguments, *rest)


if __name__ == "__main__":
    sys.exit(main())
