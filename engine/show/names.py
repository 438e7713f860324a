"""The one vocabulary that people read in place of the code's names: of tasks, measures, units, rewards, stages.

Tables, report, card, evaluation and the pages of docs/ all take their words from here; scores.json and metrics.jsonl
keep the code's names; a row of scores.json has both.  Imports nothing.
"""

from __future__ import annotations

# Tasks ----------------------------------------------------------------------------------------------------------------

SUMMARY = "summary"
"""Task whose rows come last and stand out."""
RECOGNITION = "rec"
GENERAL = frozenset({"general_vqa", "general_image"})
"""Tasks that no training sees: do other skills stay?"""

TASKS = {
    RECOGNITION: "Recognition: is the concept in the photo?",
    "vqa": "Questions about a photo of the concept",
    "qa": "Questions about the concept, no photo",
    "choice": "Multiple choice",
    "rea": "Infer what an indirect request means",
    "dense_rea": "Infer what a long request means",
    "gen": "Draw the concept",
    "pure_gen": "Draw the concept",
    "dense_gen": "Draw the concept, long requests",
    "rea_gen": "Infer what is meant, then draw it",
    "dense_rea_gen": "Infer it from a long request, draw it",
    "general_vqa": "Questions about photos of nobody in particular",
    "general_image": "Draw a caption without a concept",
    "t2i": "Draw a caption",
    "mcq": "Multiple choice",
    "oe": "Open questions",
    "read": "Which digit is in the picture?",
    "count": "How many of four digits are above another?",
    "reckon": "Reckon with two digits",
    "write": "Write a digit",
    "reckon_write": "Reckon, then write the result",
    "geneval": "GenEval's prompts",
    "dpg": "DPG-Bench's prompts",
    "wise": "WISE's prompts",
    "t2i_compbench": "T2I-CompBench's prompts",
    "mmmu": "MMMU's questions",
    "mmbench": "MMBench's questions",
    "pope": "POPE: is it in the picture?",
    "mathvista": "MathVista's problems",
    SUMMARY: "All tasks but those not trained on: means",
}
"""Tasks of UnifyBench++ and of CoRL in words; another name is shown as it is. A concept is what the data gives a name
to (`<bobo>`): in the rendered world a creature."""
EXAMPLE_TASKS = (
    *("rea", "dense_rea", "reckon", "dense_gen", "pure_gen", "write", "general_image", "t2i"),
    *("rec", "vqa", "read", "count", "qa", "mcq", "oe"),
)
"""Tasks of which examples are shown before and after, where the data has them: drawings, then answers."""
NOT_TRAINED = " (not trained on)"
PHOTOS = {
    "shown": "the photo that the model sees",
    "concept": "a photo of the concept; the model does not see it",
    "real": "a real picture of it; the model does not see it",
}
"""What the photo beside a request is."""

# Measures -------------------------------------------------------------------------------------------------------------

ANSWERS = {"greedy": "most likely answer", "sampled": "sampled answer"}
"""How an answer came about, by the name that scores.json has for it."""
INDEPENDENT = "cnn"
READERS = {INDEPENDENT: "classifier", "checker": "checker"}
"""Who says what a drawing shows, the independent one first."""
READ = {"all_right": "drawings right", "attributes": "attributes right"}
"""What is counted of drawings, the stricter first."""
MEASURES = {
    ANSWERS["greedy"]: "the answer made of each time the likeliest word is right (greedy decoding)",
    ANSWERS["sampled"]: "an answer sampled word by word, as in training, is right",
    READ["all_right"]: "share of drawings in which every attribute that was asked for is right",
    READ["attributes"]: "share of the attributes that were asked for that are right, mean over drawings",
    READERS[INDEPENDENT]: "a network that no reward uses reads the drawing",
    READERS["checker"]: "the attribute reader that gives Sync-R1's reward “judge” reads the drawing",
    "likeness": "how like the concept's photos a drawing is, from 0 to 1; that does not make it right",
    "by own tower": "the starting model's own frozen vision tower",
    "cycle": "reward: like the real picture, and captioned back to the prompt",
    "tim": "reward: words and patches match in the starting model's own features",
    "clip_text": "reward: CLIP's likeness of picture and prompt",
    "clip_image": "reward: CLIP's likeness of picture and real picture",
    "CLIP-T": "cosine of picture and prompt by CLIP",
    "CLIP-I": "cosine of picture and photos of the concept by CLIP",
    "form": "the answer keeps the form <think>…</think><answer>…</answer>",
    "% balanced accuracy": "mean of two shares of right answers, where yes is right and where no is; guessing: 50 %",
    "% of words": "share of the words that belong into the answer which stand at their place, mean over answers",
    "% mean of tasks": "mean of the tasks' scores, each in its own unit",
    "% of answers": "share of the answers that are right",
    "character BLEU, 0 to 1": "how much of the right answer's characters the answer has, in their order",
}
"""What the measures' names, or parts of them, and units mean; shown beside the table for those that occur."""

AT_CHANCE, BELOW_CHANCE, FELL, UNTRAINED = "at chance", "below chance", "fell", "not trained on"
MARKS = {
    UNTRAINED: "no training saw this task",
    AT_CHANCE: "guessing scores as much: its level lies within the interval",
    BELOW_CHANCE: "guessing scores more",
    FELL: "worse than before: the interval of the change lies below 0",
}

PER_CENT = "% of "
UNITS = {
    "recall": "% balanced accuracy",
    "words": PER_CENT + "words",
    "accuracy": PER_CENT + "answers",
    "bleu": "character BLEU, 0 to 1",
}
"""Of the measures that may be a task's main score."""
MEAN_UNIT = "% mean of tasks"
"""Of the mean of main scores, which are not all of one unit."""
OF_DRAWINGS = {
    "identity": ("likeness, by own tower", "likeness, 0 to 1"),
    "clip_t": ("CLIP-T", "cosine"),
    "clip_i": ("CLIP-I", "cosine"),
}
"""What else is said of drawings: its name in a table and its unit."""
INTERVALS = (
    "in brackets: the 95 % interval, which more items would narrow (Wilson's for shares of whole items, else a "
    "bootstrap over items)"
)
"""Of every table of held-out scores."""

# Training -------------------------------------------------------------------------------------------------------------

REWARDS = {
    "reward": "total",
    "identity": "like the concept's photos",
    "judge": "shows what was asked",
    "text": "says what is right",
    "cycle": "like the real picture, and captioned back",
    "tim": "words and patches match",
    "accuracy": "answer is right",
    "format": "answer keeps its form",
    "clip_text": "CLIP: picture and prompt",
    "clip_image": "CLIP: picture and real picture",
    "bleu": "answer is near the right one",
    "geneval": "GenEval: objects, numbers, colours, places",
    "pickscore": "PickScore: people's choice",
    "clip": "CLIP: picture and request",
    "hps": "HPS: people's choice",
    "aesthetic": "looks good",
    "siglip": "SigLIP: picture and request",
    "vqa_score": "a model finds it in the picture",
    "ocr": "text can be read",
    "detector": "objects are there",
    "git": "T2I-R1: GIT finds its nouns",
    "orm": "T2I-R1: a model finds its prompt",
    "face": "like the person's face",
}
"""Built-in rewards; one of a user's own has its own name."""
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("identity", "judge", "text", "accuracy", "format", "bleu"), (0.0, 1.0)),
    **dict.fromkeys(("geneval", "vqa_score", "ocr", "detector", "git", "orm", "face"), (0.0, 1.0)),
    **dict.fromkeys(("tim", "clip_text", "clip_image", "clip", "siglip", "hps"), (-1.0, 1.0)),
}
"""Least and most that a built-in reward can say; of the others it is not known."""
STAGES = {
    "wait": "waiting for what another process samples",
    "rollout": "sampling",
    "reward": "rewards",
    "pack": "packing",
    "score": "log-probabilities",
    "update": "update of the weights",
    "evaluation": "scoring on held-out items",
}
"""Stages of a step, as metrics.jsonl names their seconds."""


def read_words(head: str, reader: str) -> str:
    """A score of drawings, `all_right` or `attributes`, by who read it.

    >>> read_words("all_right", "cnn")
    'drawings right, classifier'
    """
    return f"{READ[head]}, {READERS.get(reader, reader)}"


def task_words(task: str, *, drawn: bool = False) -> str:
    """A prompt's task in words; `drawn`: what is looked at is a picture, where the task also has a text.

    >>> task_words("rea", drawn=True)
    'Infer what is meant, then draw it'
    """
    return TASKS.get(f"{task}_gen" if drawn else task) or TASKS.get(task) or task.replace("_", " ")


def training_task_words(task: str, *, drawn: bool = False, rewarded: bool = True) -> str:
    """The same of a prompt that is trained on; those without a reward are anchors."""
    words = task_words(task, drawn=drawn).removesuffix(NOT_TRAINED)
    return words if rewarded else f"{words} (anchor: held in place, not rewarded)"


def reward_words(name: str) -> str:
    """A reward in words, its own name behind them where they differ."""
    return f"{REWARDS[name]} ({name})" if name in REWARDS and name != "reward" else REWARDS.get(name, name)
