"""What is written on signs, plates and labels: words, invented words, numbers, prices, times, plate numbers.

Every text can be read in one way only: no letter stands where its twin (I and l, O and 0) could as well.
"""

from __future__ import annotations

import random

# Two to ten letters; as found on shops, streets, doors, offices, menus and packages.
WORDS = tuple(
    """
    open closed exit enter entrance push pull stop go slow wait yield danger caution warning notice private
    public parking taxi bus train tram metro station airport harbor bridge tunnel street road avenue lane
    square park garden north south east west left right up down in out on off hot cold free sale new used
    rent sold cash card bank post office police fire doctor clinic hospital pharmacy school library museum
    gallery theater cinema music hotel hostel motel inn room lobby lounge bar pub cafe coffee tea bakery
    bread cake pizza pasta sushi burger grill diner bistro kitchen menu lunch dinner breakfast brunch soup
    salad sandwich juice water milk beer wine cider soda lemon apple orange cherry banana mango peach plum
    grape melon berry honey sugar salt pepper butter cheese egg eggs fish meat chicken beef pork bacon rice
    beans corn potato tomato onion garlic carrot mint basil cookie donut muffin waffle pancake toast cream
    ice candy cocoa vanilla caramel espresso latte mocha flat white black brown red green blue yellow purple
    pink gray gold silver market shop store books toys shoes hats bags flowers plants pets garage repair
    tools paint wood steel glass stone brick leather cotton wool silk linen fashion style beauty salon
    barber hair nails spa gym sport yoga dance club studio art photo print copy paper ink pen desk chair
    table lamp sofa bed bath shower laundry cleaner tailor jewelry watch clock optician vision dental vet
    lawyer notary agency travel tours tickets info help service center central city town village county
    state hall court house home tower castle palace church temple chapel college campus lab factory works
    depot storage supply trade import export mill farm ranch barn stable orchard vineyard winery brewery
    river lake beach island ocean bay coast cliff valley hill mountain forest meadow spring summer autumn
    winter sun moon star sky cloud rain snow wind storm thunder light night day morning noon evening today
    tomorrow monday tuesday wednesday thursday friday saturday sunday january march april may june july
    august october december one two three four five six seven eight nine ten first second third last next
    floor level gate door window stairs lift elevator toilet ladies gents staff only guests members welcome
    hello thanks please quiet silence smoking dogs cats bikes cars trucks vans boats ferry pier dock marina
    anchor captain pilot driver rider runner walker hiker camper tent cabin lodge resort pool sauna slide
    swing playground circus carnival festival concert opera ballet jazz rock folk piano violin guitar drum
    trumpet radio video film camera phone mobile laptop data network cable wire power energy solar battery
    fuel gas diesel oil air tire brake engine motor speed limit zone area border customs visa passport
    ticket token coupon gift prize winner lucky magic royal grand prime super mega mini maxi plus extra
    ultra fresh natural organic vegan local daily weekly fast easy smart happy sunny cozy rustic modern
    classic vintage antique urban nordic alpine tropical golden crystal velvet marble copper iron eagle
    falcon robin raven swan heron owl lion tiger bear wolf fox deer horse pony rabbit turtle dolphin whale
    shark coral pearl shell lotus rose lily tulip daisy maple oak pine cedar willow birch olive amber ruby
    jade opal total price offer deal bonus half double pair set kit box pack bottle can jar cup mug plate
    bowl fork spoon knife press ring bell call ask pay order pick drop keep clean safe clear dry wet soft
    hard heavy high low deep wide narrow short long big small round quick mail letter parcel stamp report
    memo draft final index page note list plan map guide rules test exam class lesson team coach goal score
    game
    """.split()
)
SHOP_NAMES = (
    "cafe bakery bar bistro deli diner grill market books shop studio hotel inn store pharmacy gallery "
    "kitchen pizza salon garage flowers toys club house"
).split()
FIRST_LETTERS = (
    "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr pl pr sh sk sl sp st th tr qu".split()
)
VOWELS = "a e i o u a e i o ai ea ee oo ou".split()
LAST_LETTERS = "- - - - n r s l m t k x d p rt nd st ll ck ng y".split()
# Plates leave out what looks like something else in many fonts.
PLATE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
PLATE_DIGITS = "23456789"
# Alone, the other letters' cases differ in size only.
SINGLES = "ABDEFGHJKLMNPQRTYabdefghnqrt23456789"
SAME_IN_BOTH_CASES = frozenset("coksuvwxzp")


def text_to_read(rng: random.Random, max_chars: int) -> str:
    """A text of 1 to `max_chars` characters, inner spaces counted. Less than half are listed words alone."""
    if max_chars == 1:
        return rng.choice(SINGLES)
    while True:
        text = rng.choices(KINDS, KIND_WEIGHTS)[0](rng, max_chars)
        if 2 <= len(text) <= max_chars:
            return text


def words_only(rng: random.Random, max_chars: int) -> str:
    """One word or two, listed ones and now and then an invented one, as on a shop's front."""
    if max_chars >= 8 and rng.random() < 0.6:
        pair = (_spelled(rng, (max_chars - 1) // 2 + 1), _spelled(rng, max_chars // 2))
        text = " ".join(pair if rng.random() < 0.5 else (rng.choice(SHOP_NAMES), pair[1]))
        if len(text) <= max_chars:
            return _cased(rng, text)
    return _cased(rng, _spelled(rng, max_chars))


def invented_word(rng: random.Random, max_chars: int) -> str:
    """Pronounceable, lower case, 2 to `max_chars` letters."""
    length = rng.randint(2, min(max_chars, 9))
    word = ""
    while len(word) < length:
        first = rng.choice(FIRST_LETTERS)
        if len(first) == 1 or length > len(word) + 2:
            word += first + rng.choice(VOWELS) + rng.choice(LAST_LETTERS).strip("-")
    return word[:length]


def price(rng: random.Random, sign: str = "") -> str:
    return f"{sign}{rng.randint(1, rng.choice((9, 9, 49)))}.{rng.randint(0, 9)}{rng.choice('00000559')}"


def _spelled(rng: random.Random, max_chars: int) -> str:
    if rng.random() < 0.4:
        return invented_word(rng, max_chars)
    word = rng.choice(WORDS)
    return word if len(word) <= max_chars else _listed(rng, max_chars)


def _listed(rng: random.Random, max_chars: int) -> str:
    while len(word := rng.choice(WORDS)) > max_chars:
        pass
    return word


def _cased(rng: random.Random, text: str) -> str:
    """Upper, Capitalised or lower case, whichever of them can be told from the others."""
    style = rng.random()
    if style < 0.5 or SAME_IN_BOTH_CASES.issuperset(text):
        return text.upper()
    # A capital I before small letters is the twin of a small l.
    if style < 0.8 and not any(word.startswith("i") for word in text.split()):
        return text.title()
    return text


def _word(rng: random.Random, max_chars: int) -> str:
    return _cased(rng, _listed(rng, max_chars))


def _invented(rng: random.Random, max_chars: int) -> str:
    return _cased(rng, invented_word(rng, max_chars))


def _two_words(rng: random.Random, max_chars: int) -> str:
    if max_chars < 5:
        return _invented(rng, max_chars)
    first = _spelled(rng, max_chars - 3)
    return _cased(rng, f"{first} {_spelled(rng, max_chars - 1 - len(first))}")


def _number(rng: random.Random, max_chars: int) -> str:
    digits = rng.randint(2, min(max_chars, 5))
    return str(rng.randint(2, 9)) + "".join(rng.choices("0123456789", k=digits - 1))


def _letters(rng: random.Random, max_chars: int) -> str:
    """Letters without a sense, which cannot be guessed."""
    return "".join(rng.choices(PLATE_LETTERS, k=rng.randint(2, min(max_chars, 5))))


def _plate(rng: random.Random, max_chars: int) -> str:
    letters, digits = _draw(rng, PLATE_LETTERS, 1, 3), _draw(rng, PLATE_DIGITS, 1, 4)
    return rng.choice(("{0}-{1}", "{0}{1}", "{0} {1}", "{1}-{0}", "{0}/{1}")).format(letters, digits)


def _draw(rng: random.Random, characters: str, fewest: int, most: int) -> str:
    return "".join(rng.choices(characters, k=rng.randint(fewest, most)))


def _price(rng: random.Random, max_chars: int) -> str:
    return price(rng, rng.choice(("", "$", "$")))


def _time(rng: random.Random, max_chars: int) -> str:
    start = rng.randint(1, 23)
    if rng.random() < 0.3:
        return f"{start}-{rng.randint(1, 12)}" + rng.choice(("", " PM", " h"))
    half = rng.choice(("", " AM", " PM")) if start <= 12 else ""
    return f"{start}:{rng.choice((0, 15, 30, 45, rng.randint(0, 59))):02d}{half}"


def _marked(rng: random.Random, max_chars: int) -> str:
    """A text with a mark in it."""
    few = min(max_chars, 7)
    word = _word(rng, few)
    number = rng.randint(2, 99)
    patterns = (
        f"{word}!",
        f"{word}?",
        f"{word}.",
        f"{word}:",
        f"{number}%",
        f"-{number}%",
        f"#{number}",
        f"No. {number}",
        f"{number}+",
        f"+{rng.randint(20, 99)} {rng.randint(200, 9999)}",
        f"{rng.choice('ABDEFGHKMR')}&{rng.choice('ABDEFGHKMR')}",
        f"{_spelled(rng, few).title()}'s",
        f"{rng.randint(2, 9)}/{rng.randint(2, 9)}",
        f"{rng.randint(2, 9)},{rng.randint(200, 999)}",
        f"{word}, {_word(rng, few)}",
        f"{rng.choice('ABCDEFGHK')}-{_draw(rng, PLATE_DIGITS, 1, 2)}",
        f"{rng.randint(2, 90)} {rng.choice(('km', 'kg', 'min', 'm', 'cm'))}",
        "Mon-Fri",
        f"{rng.randint(222, 999)}-{rng.randint(2000, 9999)}",
    )
    return rng.choice(patterns)


KINDS = (_word, _invented, _two_words, _number, _letters, _plate, _price, _time, _marked)
KIND_WEIGHTS = (34, 24, 10, 8, 4, 7, 4, 3, 8)
