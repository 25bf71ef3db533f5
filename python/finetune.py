"""Fine-tune what pretrain.py made on another text, its classes or questions about it, or on other images."""

import sys
from pathlib import Path

from lspm_models.options import errors_in_one_line

with errors_in_one_line("finetune.py"):  # what comes in with these may not be installed
    from lspm_models.checkpoint import checkpoints
    from lspm_models.jobs import job_of
    from lspm_models.scripts import opened_run, train, training_parser


def main() -> int:
    with errors_in_one_line("finetune.py"):
        job = job_of(sys.argv[1:], fine_tuning=True)
    parser = training_parser(*job.fine_tuning)
    parser.run.add_argument("--init", metavar="FOLDER", help=job.init_help)
    job.add_options(parser, fine_tuning=True)
    arguments = parser.parse_args()
    if ("init" in arguments) == ("resume" in arguments):
        parser.error("give either --init FOLDER to begin or --resume FOLDER to continue")
    with errors_in_one_line(parser.prog):
        init, defaults = None, {}
        if "init" in arguments:
            init = job.find(arguments.init)
            defaults = job.fine_tuning_defaults(init)
        init = init and str(init)
        with opened_run(arguments, print, job, fine_tuning=True, init=init, defaults=defaults) as run:
            init = Path(run.init)
            if "init" in arguments:
                job.adopt(run, init)
            task, data = job.prepare(run)
            if not checkpoints(run.folder / "checkpoints") or (run.tuning and run.tuning.adapts):
                job.load(run, init, task)
            if run.tuning:
                run.tuning.apply(task)
    return train(parser.prog, run, job, task, data)


if __name__ == "__main__":
    sys.exit(main())
