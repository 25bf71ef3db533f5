"""What mkdocs does to the pages of docs/ (mkdocs.yml names this file): docstrings, plots, tables that unfold.

`::: package.module.name` becomes a signature and a docstring. Else docs/ reads well in the repository, too:
pictures stand where benchmarks/ has them, tables are whole.
"""

import re

import docstrings
import markers
import results
import speed_plot

FOLDER = markers.ROOT / "benchmarks" / "results"
PICTURES = re.compile(r"\]\((\.\./)+(benchmarks/results/)")
NAMES = re.compile(r"^::: ([\w.]+)$", re.M)


def on_files(files, config):
    """Puts the pictures that pages show beside them."""
    from mkdocs.structure.files import File

    text = "".join(page.read_text() for page in markers.pages())
    for picture in FOLDER.glob("*.png"):
        name = picture.relative_to(markers.ROOT).as_posix()
        if name in text:
            files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Shows what is named, and gives every table of results its plot and folds it up."""
    rows = [results.load(path) for path in sorted(FOLDER.glob("*.json"))]
    up = "../" * page.file.src_uri.count("/")

    def folded(match: re.Match) -> str:
        plot = speed_plot.svg(list(markers.chosen(match, rows)))
        plot = f'<div class="plot">{plot}</div>\n\n' if plot else ""
        summary = "<summary>The rows, each with the command that measures it again</summary>"
        return f'{plot}<details markdown="1">{summary}\n\n{match[0]}\n\n</details>'

    markdown = NAMES.sub(lambda match: docstrings.shown(match[1], markers.ROOT), markdown)
    return PICTURES.sub(rf"]({up}\2", markers.RESULTS.sub(folded, markdown))
