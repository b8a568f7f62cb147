"""
The words of the demo's stories: slots, rules and the words that carry a feeling. Only data:
`grammar` explains it.
"""

from __future__ import annotations


def _even(*options: str) -> dict[str, float]:
    return dict.fromkeys(options, 1.0)


def _falling(*options: str) -> dict[str, float]:
    """Weights 1, 1/2, 1/3, ...: a few words are common and many are rare, as in real text."""
    return {option: 1 / rank for rank, option in enumerate(options, start=1)}


HAPPY_WORDS = frozenset({"happy", "smiled", "laughed", "glad", "proud", "joy", "cheered", "danced", "hugged", "sang"})
SAD_WORDS = frozenset({"sad", "cried", "tears", "lonely", "sorry", "sighed", "gloomy", "wept", "hurt", "alone"})

SLOTS: dict[str, dict[str, float]] = {
    "name": _falling(
        "Tim",
        "Lily",
        "Max",
        "Mia",
        "Ben",
        "Anna",
        "Sam",
        "Rosie",
        "Leo",
        "Nora",
        "Finn",
        "Ella",
        "Tom",
        "Ruby",
        "Otto",
        "Ida",
    ),
    "trait": _even("little", "brave", "shy", "curious", "kind", "quiet", "clever", "sleepy"),
    "kind": _falling("girl", "boy", "rabbit", "fox", "mouse", "bear", "duck", "kitten", "hedgehog", "puppy"),
    "home": _even("by the river", "near the sea", "in the forest", "on a hill", "in a small town", "at the old mill"),
    "colour": _even("red", "blue", "green", "yellow", "golden", "striped"),
    "thing": _falling("ball", "kite", "boat", "drum", "lamp", "bell", "book", "hat", "wagon", "doll"),
    "time": _even("day", "morning", "summer day", "afternoon"),
    "helper": _falling("owl", "turtle", "farmer", "squirrel", "grandmother", "frog", "baker", "goat"),
}

# Troubles carry their own attempts and helps, so that a story hangs together.
_TROUBLES = {
    "But the {thing} got stuck in a tall tree.": (
        _even("{name} jumped as high as possible.", "{name} shook the tree.", "{name} threw a stick at it."),
        _even("The {helper} climbed up the tree.", "The {helper} brought a long ladder."),
    ),
    "But the {thing} fell into a deep well.": (
        _even("{name} let down a rope.", "{name} leaned over the edge.", "{name} pulled up the bucket."),
        _even("The {helper} tied a hook to the rope.", "The {helper} went down into the well."),
    ),
    "But the {thing} broke in two.": (
        _even("{name} pressed the parts together.", "{name} wrapped it in a leaf.", "{name} used some mud."),
        _even("The {helper} had a pot of glue.", "The {helper} found a needle and thread."),
    ),
    "But the wind carried the {thing} away.": (
        _even("{name} ran after it.", "{name} looked behind every bush.", "{name} followed the wind."),
        _even("The {helper} searched the tall grass.", "The {helper} knew where the wind goes."),
    ),
    "But a big dog took the {thing}.": (
        _even("{name} shouted at the dog.", "{name} chased the dog.", "{name} hid and waited."),
        _even("The {helper} gave the dog a bone.", "The {helper} talked to the dog."),
    ),
}

# Two closing sentences. A story that went well mostly ends well: H happy, N neutral, S sad.
_ENDINGS = {
    "well": {"HH": 0.34, "NH": 0.18, "HN": 0.14, "NN": 0.12, "SH": 0.06, "NS": 0.08, "SS": 0.08},
    "badly": {"SS": 0.34, "NS": 0.18, "SN": 0.14, "NN": 0.12, "HS": 0.06, "NH": 0.08, "HH": 0.08},
}
_MOODS = {"H": "happy", "N": "neutral", "S": "sad"}

RULES: dict[str, dict[str, float]] = {
    "opening": {"<start> <home> <find>": 1.0},
    "start": {
        "Once upon a time there was a {trait} {kind} named {name}.": 3.0,
        "There once was a {trait} {kind} called {name}.": 1.0,
    },
    "home": {"{name} lived {home}.": 2.0, "The home of {name} was {home}.": 1.0},
    "find": {
        "One {time} {name} found a {colour} {thing}.": 2.0,
        "One {time} {name} got a {colour} {thing} as a gift.": 1.0,
    },
    "continuation": {f"<trouble-{i}>": 1.0 / (i + 1) for i in range(len(_TROUBLES))},
    "feeling": {"{name} was sad.": 2.0, "{name} was not worried.": 1.0, "{name} did not give up.": 1.0},
    "ask": {
        "Then {name} asked the {helper} for help.": 2.0,
        "The {helper} saw it and came to help.": 1.0,
        "Then {name} called the {helper}.": 1.0,
    },
    "outcome": {
        "In the end the {thing} was safe. <ending-well>": 0.35,
        "Soon {name} had the {thing} back. <ending-well>": 0.2,
        "In the end the {thing} was gone. <ending-badly>": 0.25,
        "But it was too late for the {thing}. <ending-badly>": 0.2,
    },
    "happy": _falling(
        "{name} smiled and was happy.",
        "{name} hugged the {helper}.",
        "They laughed and jumped around.",
        "{name} felt very proud.",
    ),
    "happy-close": _falling(
        "They danced all day.",
        "The {helper} was glad too.",
        "Everyone cheered for {name}.",
        "That night {name} sang with joy.",
    ),
    "neutral": _falling(
        "They sat down and ate some bread.",
        "It started to rain.",
        "They talked about the {thing}.",
        "The {helper} had to go.",
    ),
    "neutral-close": _falling(
        "{name} went home.",
        "The sun went down.",
        "{name} said good night to the {helper}.",
        "Then it was time for bed.",
    ),
    "sad": _falling(
        "{name} cried and was sad.",
        "{name} sat alone in the dark.",
        "There were tears on the face of {name}.",
        "{name} said sorry to the {helper}.",
    ),
    "sad-close": _falling(
        "{name} felt lonely.",
        "They wept for a long time.",
        "The {helper} sighed and went away.",
        "It was a gloomy night for {name}.",
    ),
}
for _i, (_trouble, (_attempts, _helps)) in enumerate(_TROUBLES.items()):
    RULES[f"trouble-{_i}"] = {f" {_trouble} <feeling> <attempt-{_i}> <ask> <help-{_i}> <outcome>": 1.0}
    RULES[f"attempt-{_i}"] = _attempts
    RULES[f"help-{_i}"] = _helps
for _kind, _pairs in _ENDINGS.items():
    RULES[f"ending-{_kind}"] = {f"<{_MOODS[m[0]]}> <{_MOODS[m[1]]}-close>": p for m, p in _pairs.items()}
