"""The tokenizer in a folder of Hugging Face's: read from it, written to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lspm_models.data.mask_tokenizer import (
    BEGIN,
    MASK,
    PADDING,
    SEPARATOR,
    UNKNOWN,
    MaskMarks,
    MaskTokenizer,
)
from lspm_models.data.pretrained_tokenizer import Marks, PretrainedTokenizer, byte_bpe, parsed
from lspm_models.data.tokenizers import ByteBpe
from lspm_models.json_files import read_object

END = "<|endoftext|>"
# Of encoders, by the names of tokenizer_config.json; what is not named there has BERT's.
MARKS = {"padding": PADDING, "begin": BEGIN, "separator": SEPARATOR, "mask": MASK, "unknown": UNKNOWN}
THEIRS = {"padding": "pad", "begin": "cls", "separator": "sep", "mask": "mask", "unknown": "unk"}


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


def read_mask_folder(folder: Path, vocabulary_size: int) -> MaskTokenizer:
    """Reads the tokenizer of an encoder in a folder of Hugging Face's.

    Args:
        folder: with tokenizer.json, or vocab.txt of WordPiece, and perhaps tokenizer_config.json.
        vocabulary_size: of the model.

    Raises:
        ValueError: files are missing or damaged, or a mark has no id; the message names it.
    """
    path = folder / "tokenizer_config.json"
    settings = read_object(path) if path.exists() else {}
    names = {ours: _content(settings.get(f"{THEIRS[ours]}_token")) or name for ours, name in MARKS.items()}
    if (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        tokenizer = parsed(path.read_text(encoding="utf-8"), str(path))
    elif (folder / "vocab.txt").exists():
        path = folder / "vocab.txt"
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        tokenizer = word_piece(
            {token: index for index, token in enumerate(tokens)}, settings, names, str(path)
        )
    else:
        raise ValueError(f"tokenizer: {folder} must hold tokenizer.json or vocab.txt, got neither")
    ids = {ours: tokenizer.token_to_id(name) for ours, name in names.items()}
    if missing := [names[ours] for ours, index in ids.items() if index is None and ours != "unknown"]:
        raise ValueError(f"tokenizer: {path} must have an id for {', '.join(missing)}, got none")
    return MaskTokenizer(tokenizer, MaskMarks(vocabulary_size, **ids), str(path))


def word_piece(vocabulary: dict[str, int], settings: dict, names: dict[str, str], where: str) -> Any:
    """Makes BERT's kind of tokenizer.

    Args:
        vocabulary: id by token.
        settings: do_lower_case, strip_accents and tokenize_chinese_chars, as in tokenizer_config.json.
        names: of the marks, as MARKS has them.
        where: for messages.

    Raises:
        ValueError: the vocabulary has no unknown token, or a setting is neither true nor false.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if names["unknown"] not in vocabulary:
        raise ValueError(f"tokenizer: {where} must have an id for {names['unknown']}, got none")
    flags = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    flags |= {name: settings[name] for name in flags if name in settings}
    for name, value in flags.items():
        if value is not None and type(value) is not bool:
            raise ValueError(f"tokenizer: {name} beside {where} must be true or false, got {value!r}")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unknown"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=flags["do_lower_case"] is not False,
        strip_accents=flags["strip_accents"],
        handle_chinese_chars=flags["tokenize_chinese_chars"] is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([name for name in names.values() if name in vocabulary])
    return tokenizer


def write_mask_folder(tokenizer: MaskTokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json of an encoder as transformers reads them."""
    content = tokenizer.to_json()["tokenizer"]
    by_id = {index: token for token, index in _vocabulary(content).items()}
    marks = {ours: getattr(tokenizer.marks, ours) for ours in MARKS}
    settings = {f"{THEIRS[ours]}_token": by_id[index] for ours, index in marks.items() if index is not None}
    _write(folder, content, settings)


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
    settings = {"eos_token": end}
    settings |= {"bos_token": marks.begin} if marks.begin else {}
    settings |= {"chat_template": marks.template} if marks.template is not None else {}
    _write(folder, content, settings)


def _write(folder: Path, content: dict, settings: dict) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
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
