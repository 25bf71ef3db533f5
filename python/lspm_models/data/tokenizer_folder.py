"""The tokenizer in a folder of Hugging Face's: read from it, written to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lspm_models.data.pretrained_tokenizer import Marks, PretrainedTokenizer, byte_bpe, parsed
from lspm_models.data.tokenizers import ByteBpe
from lspm_models.json_files import read_object

END = "<|endoftext|>"


def read_folder(folder: Path, config: dict, vocabulary_size: int) -> PretrainedTokenizer:
    """Reads the tokenizer in a folder of Hugging Face's.

    Args:
        folder: with tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json, chat_template.jinja
            and generation_config.json are read where they are there.
        config: of config.json.
        vocabulary_size: of the model.

    Raises:
        ValueError: files are missing or damaged; the message names them.
    """
    settings, generation = (
        read_object(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    if (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        tokenizer = parsed(path.read_text(encoding="utf-8"), str(path))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        vocabulary = read_object(folder / "vocab.json")
        if not all(type(index) is int and index >= 0 for index in vocabulary.values()):
            raise ValueError(f"tokenizer: {folder / 'vocab.json'} must hold ids of tokens, got others")
        if broken := [merge for merge in merges if len(merge) != 2]:
            raise ValueError(f"tokenizer: {folder / 'merges.txt'} must hold pairs of tokens, got {broken[0]}")
        tokenizer = byte_bpe(vocabulary, merges, digits=False, where=str(folder / "merges.txt"))
        tokenizer.add_special_tokens([END] if END in vocabulary else [])
    else:
        raise ValueError(
            f"tokenizer: {folder} must hold tokenizer.json, or vocab.json and merges.txt, got neither"
        )
    named = _content(settings.get("eos_token"))
    named = tokenizer.token_to_id(named) if named else None
    ends = [named, generation.get("eos_token_id"), config.get("eos_token_id")]
    stops = [one for end in ends for one in (end if isinstance(end, list) else [end]) if type(one) is int]
    if not stops:
        raise ValueError(
            f"tokenizer: {folder} must say what ends a text, eos_token or eos_token_id, got neither"
        )
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    marks = Marks(
        vocabulary_size, stops[0], tuple(dict.fromkeys(stops)), _content(settings.get("bos_token")), template
    )
    return PretrainedTokenizer(tokenizer, marks, str(folder))


def write_folder(tokenizer: ByteBpe | PretrainedTokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    content = tokenizer.to_json()["tokenizer"]
    if isinstance(tokenizer, PretrainedTokenizer):
        marks = tokenizer.marks
        by_id = {index: token for token, index in _vocabulary(content).items()}
        end = by_id.get(marks.end_of_text, END)
    else:
        marks, end = Marks(tokenizer.vocabulary_size, tokenizer.end_of_text, (tokenizer.end_of_text,)), END
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append(
            {"id": tokenizer.end_of_text, "content": END, **flags, "special": True}
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    settings |= {"bos_token": marks.begin} if marks.begin else {}
    settings |= {"chat_template": marks.template} if marks.template is not None else {}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _vocabulary(content: dict) -> dict[str, int]:
    """Returns the id of each token in a tokenizer's JSON."""
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return content["model"]["vocab"] | added


def _content(token: Any) -> str:
    """Returns the text of a token in tokenizer_config.json, which may stand in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""
