"""The words of the synthetic language: small closed classes, so that a tiny vocabulary covers nearly all of them."""

NAMES = (
    *("Arlo", "Bruno", "Colin", "Emil", "Hugo", "Ivan", "Milo", "Otto", "Pavel", "Ruben", "Simon", "Tomas"),
    *("Ada", "Bella", "Clara", "Dora", "Elsa", "Greta", "Ines", "Lena", "Mira", "Nora", "Rosa", "Vera"),
)
HE_WORKS = ("king", "miller", "baker", "smith", "farmer", "sailor")
SHE_WORKS = ("queen", "weaver", "painter", "singer", "teacher", "nurse")
TOWNS = ("Alder", "Brook", "Copper", "Dune", "Ember", "Fern", "Harbor", "Juniper", "Larch", "Oak", "Pebble", "Willow")

COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey", "golden", "silver", "yellow")
SIZES = ("tiny", "small", "tall", "big", "huge")
OBJECTS = (
    *("lamp", "key", "kite", "drum", "bell", "cup", "coat", "hat", "map", "book", "coin", "ring", "rope", "boat"),
    *("clock", "box", "flute", "knife", "mirror", "basket", "chair", "brush", "candle", "ladder"),
)
PLACES = (
    *("river", "bridge", "house", "tree", "hill", "wall", "gate", "mill", "well", "garden", "barn", "tower"),
    *("table", "bed", "door", "market"),
)
PREPOSITIONS = ("under", "behind", "near", "beside", "above")
FOODS = ("pears", "plums", "nuts", "bread", "soup", "cheese", "honey", "beans", "rice", "figs", "cake", "milk")
ADVERBS = ("slowly", "quietly", "again", "alone", "all day", "every night")
FEELINGS = ("happy", "tired", "hungry", "cold", "brave", "shy")
WEATHER = ("rain", "snow", "wind", "fog", "sun")
TIMES = ("In the morning", "At noon", "At night", "In the spring", "In the winter")

# A creature's habits: the first verb is its most common one, the next ones rarer. Verbs are in the plural form.
CREATURES = {
    "dog": ("bark", "run", "sleep"),
    "cat": ("sleep", "hide", "jump"),
    "bird": ("sing", "fly", "nest"),
    "horse": ("run", "rest", "wait"),
    "fox": ("hide", "run", "hunt"),
    "frog": ("jump", "sing", "swim"),
    "duck": ("swim", "walk", "rest"),
    "goat": ("climb", "jump", "eat"),
    "bear": ("sleep", "hunt", "walk"),
    "owl": ("hunt", "wait", "fly"),
    "mouse": ("hide", "eat", "climb"),
    "bee": ("fly", "work", "sing"),
}
_PLURALS = {"fox": "foxes", "mouse": "mice"}
DEEDS = ("walk", "work", "rest", "wait", "sing", "read")
SEEING = ("see", "hear", "follow", "like")

NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
LIST_WORDS = (*OBJECTS, *PLACES, *FOODS, *COLOURS, *TOWNS, *NUMBERS)


def plural(noun: str) -> str:
    """The plural of a creature."""
    return _PLURALS.get(noun, noun + "s")


def singular_verb(verb: str) -> str:
    """The third person singular of a verb: "sing" -> "sings"."""
    return verb[:-1] + "ies" if verb == "fly" else verb + "s"
