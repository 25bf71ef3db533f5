"""Made-up people, where they live, what they do and what they like, with questions, in SQuAD's format."""

import json
import random

NAMES = "Ann Bob Cid Dan Eve Fay Gus Hal Ida Jon Kay Leo Mia Ned Oda Pat".split()
FACTS = {
    "lives in {}": ("Where does {} live?", ["Rome", "Oslo", "Lima", "Kiel", "New York", "Bern"]),
    "works as a {}": ("What does {} work as?", ["baker", "smith", "nurse", "tailor", "farmer", "singer"]),
    "likes {}": ("What does {} like?", ["tea", "cold milk", "figs", "plums", "bread", "old cheese"]),
}


def people(count, seed=0, *, impossible=False):
    """A file's content: of each person two facts and a question about each, or about what is not told."""
    draw, paragraphs = random.Random(seed), []
    for index in range(count):
        name, told = draw.choice(NAMES), draw.sample(sorted(FACTS), 2)
        context, questions = name, []
        for place, fact in enumerate(told):
            question, values = FACTS[fact]
            answer = draw.choice(values)
            context += " and " * place + " " * (not place) + fact.format("")
            entry = {"text": answer, "answer_start": len(context)}
            context += answer
            questions.append(
                {"id": f"{index}-{place}", "question": question.format(name), "answers": [entry]}
            )
        if impossible:
            (fact,) = set(FACTS) - set(told)
            question = {"id": f"{index}-2", "question": FACTS[fact][0].format(name), "answers": []}
            questions.append({**question, "is_impossible": True})
        paragraphs.append({"context": f"{context}.", "qas": questions})
    return {"version": "tiny", "data": [{"title": "people", "paragraphs": paragraphs}]}


def write(path, *arguments, **options):
    """Writes people() as JSON."""
    path.write_text(json.dumps(people(*arguments, **options)), encoding="utf-8")
    return path
