"""Pretrain a GPT on text or a ResNet on images: files, folders, or data that is on this machine already."""

import sys

from lspm_models.options import errors_in_one_line

with errors_in_one_line("pretrain.py"):  # what comes in with these may not be installed
    from lspm_models.jobs import job_of
    from lspm_models.scripts import opened_run, train, training_parser


def main() -> int:
    with errors_in_one_line("pretrain.py"):
        job = job_of(sys.argv[1:])
    parser = training_parser(*job.pretraining)
    job.add_options(parser)
    arguments = parser.parse_args()
    with errors_in_one_line(parser.prog), opened_run(arguments, print, job) as run:
        task, data = job.prepare(run)
    return train(parser.prog, run, job, task, data)


if __name__ == "__main__":
    sys.exit(main())
