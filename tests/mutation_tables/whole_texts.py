"""Bugs in tasks on whole texts: what is pooled, read, set aside, cut into windows, answered and measured."""

from functools import partial

from mutations import Mutation

MODELS = "python/lspm_models"
CLASSES = ("tests/models/test_sequence_classification.py", "-x", "-k", "not learns")
TEXTS = ("tests/models/test_labelled_texts.py", "-x")
SCORES = ("tests/models/test_squad_metrics.py", "-x")
ANSWERS = ("tests/models/test_question_answering.py", "-x")
in_classes = partial(Mutation, file=f"{MODELS}/tasks/sequence_classification.py", tests=CLASSES)
in_outputs = partial(Mutation, file=f"{MODELS}/sequence_outputs.py", tests=CLASSES)
in_texts = partial(Mutation, file=f"{MODELS}/data/labelled_texts.py", tests=TEXTS)
in_sequences = partial(Mutation, file=f"{MODELS}/data/sequences.py", tests=TEXTS)
in_task = partial(Mutation, file=f"{MODELS}/tasks/question_answering.py", tests=ANSWERS)
in_questions = partial(Mutation, file=f"{MODELS}/data/questions.py", tests=ANSWERS)
in_scores = partial(Mutation, file=f"{MODELS}/squad_metrics.py", tests=SCORES)
in_answers = partial(Mutation, file=f"{MODELS}/sequence_outputs.py", tests=ANSWERS)

MUTATIONS = [
    in_classes(
        name="texts: an encoder sees padding",
        old="model(ids, None if bool(inside.all()) else inside, token_types)",
        new="model(ids, None, token_types)",
    ),
    in_classes(
        name="texts: the last token but one is pooled", old="lengths - 1]", new="(lengths - 2) % lengths]"
    ),
    in_classes(
        name="texts: the mean is over padding too",
        old="masked_fill(~inside[:, :, None], 0).sum(1)",
        new="masked_fill(~inside[:, :, None], 0 * lengths[0]).sum(1) * lengths[:, None] / lengths.max()",
    ),
    in_classes(
        name="texts: padding is a token to learn",
        old="tokens[:, 1:].masked_fill(tokens[:, 1:] < 0, IGNORE_INDEX)",
        new="tokens[:, 1:].clamp(min=0)",
    ),
    in_classes(
        name="texts: evaluation counts classes the other way",
        old="pairs = targets * self.classes + logits.argmax(1)",
        new="pairs = targets + self.classes * logits.argmax(1)",
    ),
    in_classes(name="texts: F1 is precision", old="counts.sum(0) + counts.sum(1)", new="2 * counts.sum(0)"),
    in_outputs(name="texts: mistakes are all texts", old="(predicted != truth)", new="(predicted >= 0)"),
    in_texts(
        name="labels: copies are texts of their own",
        old='    return re.sub(r"[\\W_]+", "", text).lower() or text',
        new="    return text",
    ),
    in_texts(
        name="labels: a text of two labels has the first",
        old="if len(labels[name]) == 1]",
        new="if len(labels[name]) >= 1]",
    ),
    in_texts(
        name="labels: what is held out is trained on",
        old="if key(item.text) not in seen]",
        new="if key(item.text) or seen]",
    ),
    in_texts(
        name="labels: the reviews held out are pretrained on",
        old="order[:REVIEWS_HELD_OUT], order[REVIEWS_HELD_OUT:]",
        new="order[:REVIEWS_HELD_OUT], order[REVIEWS_HELD_OUT - 1 :]",
    ),
    in_sequences(
        name="batches: rows are drawn with repetition",
        old="generator.permutation(len(self._sequences))",
        new="generator.integers(len(self._sequences), size=len(self._sequences))",
    ),
    in_sequences(
        name="batches: processes have the same rows",
        old="self._process :: self._processes]",
        new=":: self._processes]",
    ),
    in_task(
        name="answers: padding may be one",
        old=".masked_fill((tokens < 0)[:, :, None], -torch.inf)",
        new="",
    ),
    in_task(
        name="answers: the question may be one",
        old="(places < contexts[:, :1]) | (places > contexts[:, 1:])",
        new="places > contexts[:, 1:]",
    ),
    in_task(
        name="answers: one token too many",
        old="    longest = min(longest, first.shape[1])",
        new="    longest = min(longest + 1, first.shape[1])",
    ),
    in_task(
        name="answers: only the first end is learned",
        old="(cross_entropy(first, targets[:, 0]) + cross_entropy(last, targets[:, 1])) / 2",
        new="cross_entropy(first, targets[:, 0])",
    ),
    in_questions(
        name="windows: the answer is one token late",
        old="(answer[0] + offset,",
        new="(answer[0] + offset + 1,",
    ),
    in_questions(
        name="windows: one token is left out", old="min(stride, room)\n", new="min(stride, room) + 1\n"
    ),
    in_questions(
        name="windows: the end of the text is left out",
        old="            if first + room >= len(ids):",
        new="            if first + 2 * room >= len(ids):",
    ),
    in_questions(
        name="questions: a text stands on both sides",
        old="parts[item.context in aside]",
        new="parts[item.context in aside and item.name.endswith('0')]",
    ),
    in_scores(name="scores: articles count", old='ARTICLES.sub(" ", ', new='ARTICLES.sub("a", '),
    in_scores(
        name="scores: words count once",
        old="Counter(ours) & Counter(theirs)",
        new="Counter(set(ours)) & Counter(set(theirs))",
    ),
    in_answers(
        name="answers: never none",
        old="if none and nothing[0] > answer[0]",
        new="if none and nothing[0] > math.inf",
    ),
    in_answers(
        name="answers: the last window's",
        old="            if score > best[index][0]:",
        new="            if score > -math.inf:",
    ),
]
