"""Essays as haystacks: generated from a small closed vocabulary, or read from a file.

RULER hides its needles in Paul Graham's essays, which need a download and are too rich for a model
of a million parameters. Generated sentences fill patterns with words grouped by meaning: plausible
prose, hardly ever repeated, of at most 500 distinct words, all in a word-level tokenizer.
"""

import json
import random
import re
from functools import lru_cache
from pathlib import Path


def sentence(rng: random.Random) -> str:
    """One sentence of 7 to 20 words: letters and single spaces, ending in '.'."""
    used: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        # A word occurs once a sentence: not "from the mill to the mill".
        choice = rng.choice([word for word in _WORDS[slot[1]] if word not in used])
        used.add(choice)
        return choice

    text = _SLOT.sub(fill, rng.choice(_PATTERNS))
    return text[0].upper() + text[1:] + "."


def paragraph(rng: random.Random, n: int) -> str:
    """`n` sentences joined by single spaces."""
    return " ".join(sentence(rng) for _ in range(n))


@lru_cache(maxsize=4)
def essay_words(path: str) -> tuple[str, ...]:
    """All words of a text file, or of RULER's PaulGrahamEssays.json ({"text": ...}); read once.

    ValueError, naming the file, if it cannot be read, is malformed, or holds no word.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is no file")
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"essay {path} cannot be read ({error}): give a UTF-8 file, or null for prose"
        ) from error
    try:
        words = (json.loads(text)["text"] if path.endswith(".json") else text).split()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'essay {path} is malformed: its JSON must be {{"text": "..."}}') from None
    if not words:
        raise ValueError(f"essay {path} is empty: give a file with text, or null for prose")
    return tuple(words)


_SLOT = re.compile(r"\{(\w+)\}")

# Every word of a group fits every pattern with the group. Words behind 'a' begin with a consonant.
_GROUPS: dict[str, str] = {
    "person": "miller baker farmer teacher sailor shepherd gardener carpenter fisherman doctor"
    " painter weaver merchant captain traveller nurse priest clerk musician potter cook librarian"
    " ferryman tailor blacksmith beekeeper",
    "folk": "neighbours children villagers fishermen farmers travellers sailors guests merchants"
    " brothers sisters visitors workers students",
    "kin": "daughter son brother sister friend mother father cousin uncle grandmother nephew",
    "nature": "old young quiet cheerful patient tired kind clever careful gentle honest lonely"
    " stubborn proud thoughtful shy generous",
    "building": "mill chapel library lighthouse inn cottage school barn workshop bakery station"
    " farm boathouse tower",
    "outside": "harbour village market bridge garden forest valley meadow river orchard square"
    " hill shore fountain pond",
    "thing": "lantern basket rope hammer ladder bucket letter map blanket kettle book key violin"
    " lamp box candle clock coat mirror flute spade ribbon",
    "look": "small new borrowed worn plain beautiful strange precious forgotten fine curious",
    "animal": "dog horse cat goat owl heron fox crow swan donkey hare robin lamb",
    "colour": "grey brown white black red golden silver pale",
    "food": "bread cheese apples soup honey tea plums pears fish butter cake",
    "weather": "rain wind snow fog frost storm mist thunder",
    "blanket": "rain snow fog frost mist darkness",
    "season": "spring summer autumn winter",
    "feeling": "joy grief relief worry pride wonder doubt hope peace",
    "manner": "slowly quietly carefully gladly patiently calmly silently proudly",
    "when": "before the storm|in the morning|after breakfast|at dusk|late in the evening"
    "|before sunrise|at noon|just after midnight|when the bells rang|as the light faded"
    "|on the first day of spring|during the long winter|at the end of the week"
    "|after the harvest|while the others slept|once the work was done",
    "often": "every morning|every evening|each winter|now and then|most days|all summer long",
    "brought": "carried brought took sent delivered",
    "found": "found lost noticed dropped hid kept discovered remembered",
    "made": "repaired cleaned sold bought finished borrowed",
    "told": "told asked reminded warned taught begged",
    "went": "walked hurried returned wandered rode came",
    "stayed": "slept waited rested sat stood",
    "moved": "ran wandered crept walked came",
    "shared": "shared prepared tasted enjoyed",
    "spoke": "talked laughed argued whispered dreamed sang",
    "deed": "close the gate|feed the horses|light the fire|mend the roof|wait for news"
    "|follow the path|count the coins|wash the windows|sweep the floor|bake more bread"
    "|gather wood|write a letter|lock the door|fetch some water|learn the song",
    "subject": "the price of wool|the coming harvest|the lost ship|the old days|a distant country"
    "|the new road|a better life|the weather|the wedding|the next journey",
    "view": "the sea was calm|the road was empty|the fields were dry|the tide was low"
    "|the night was cold|the air smelled of smoke|the stars were bright"
    "|the streets were crowded|the days were short|the house was silent",
    "part": "door roof window wall gate floor stove chimney",
    "opening": "door window gate box cupboard",
    "state": "broken dirty loose damp old",
    "mended": "repaired cleaned painted mended",
    "near": "beside|behind|near|beyond|across from",
    "covered": "covered hid reached surrounded",
    "said": "said believed knew thought wrote",
}
_WORDS = {
    group: tuple(words.split("|" if "|" in words else None)) for group, words in _GROUPS.items()
}

_PATTERNS: tuple[str, ...] = (
    "the {nature} {person} {brought} a {look} {thing} to the {building} {when}",
    "the {person} {brought} the {thing} from the {building} to the {outside} {when}",
    "{when} the {nature} {person} {went} {manner} to the {outside} with a {thing}",
    "the {person} {found} a {look} {thing} {near} the {outside} {when}",
    "the {person} and the {nature} {person} {spoke} about {subject} {when}",
    "the {folk} {went} to the {outside} to hear about {subject}",
    "the {person} {told} his {kin} to {deed} {when}",
    "the {nature} {person} {told} the {folk} to {deed} and to {deed}",
    "a {colour} {animal} {stayed} {near} the {building} while the {person} {made} the {thing}",
    "the {colour} {animal} {moved} {manner} across the {outside} {when}",
    "the {person} {shared} {food} and {food} with the {folk} {when}",
    "there was {food} on the table and the {nature} {person} {shared} it {manner}",
    "the {blanket} {covered} the {outside} and the {folk} {stayed} {manner} {near} the stove",
    "in {season} the {blanket} {covered} the {building} where the {person} once lived",
    "{often} the {person} {made} a {look} {thing} for the {folk}",
    "because {view} the {person} {went} {manner} from the {outside} to the {building}",
    "although {view} the {folk} {spoke} about {subject} with great {feeling}",
    "the {nature} {person} felt {feeling} and {feeling} when the {kin} {went} home",
    "the {person} {said} that the {look} {thing} was still {near} the {building}",
    "her {kin} {said} that {view} and that the {weather} would soon come",
    "nobody {said} that the {nature} {person} had left the {thing} {near} the {part}",
    "the {part} of the {building} was {state} so the {person} {mended} it {when}",
    "if the {weather} comes in {season} the {folk} will {deed} {manner}",
    "his {kin} wanted to {deed} but the {nature} {person} wanted to {deed}",
    "the {animal} and the {animal} {stayed} {manner} {near} the {outside} {when}",
    "with {feeling} the {person} opened the {opening} and saw a {look} {thing}",
    "the {thing} and the {thing} belonged to the {kin} of the {nature} {person}",
    "between the {outside} and the {building} there is a {look} {thing} under a tree",
)

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            word
            for text in (*_PATTERNS, *(entry for words in _WORDS.values() for entry in words))
            for word in _SLOT.sub(" ", text).split()
        }
    )
)
"""Every word of `sentence`, lower-cased and sorted."""
