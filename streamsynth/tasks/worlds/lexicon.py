"""The words: every category holds single plain words that can stand in the same place of a sentence.

Nouns are singular or uncountable and read well after "the" (people after "our", months, holidays,
places and subjects with nothing in front), so that any filling of a frame is correct English.
"""

_LISTS = {
    # Food.
    "meats": "beef pork lamb veal ham bacon turkey duck chicken sausage steak venison",
    "fishes": "salmon tuna cod trout herring halibut mackerel haddock sole carp eel bass",
    "soups": "soup broth chowder bisque gazpacho minestrone borscht goulash ramen stew bouillon chili",
    "desserts": "pudding cake pie tart sorbet custard brownie cheesecake waffle pancake cookie strudel",
    "pastas": (
        "pasta spaghetti lasagne ravioli macaroni risotto couscous polenta tortellini linguine gnocchi rice"
    ),
    "breads": (
        "bread toast baguette bagel croissant ciabatta pretzel tortilla brioche focaccia flatbread sandwich"
    ),
    "vegetables": (
        "spinach cabbage broccoli celery kale lettuce fennel asparagus cucumber pumpkin zucchini leek"
    ),
    "fruits": "mango melon pineapple papaya apple lemon banana grapefruit coconut peach pear plum",
    "cheeses": (
        "cheddar brie feta gouda mozzarella parmesan camembert ricotta gruyere halloumi stilton manchego"
    ),
    "sauces": "ketchup mustard mayonnaise pesto gravy salsa hummus vinegar tahini guacamole relish chutney",
    "spices": "pepper ginger garlic basil mint parsley cinnamon saffron thyme rosemary oregano paprika",
    "drinks": "tea coffee cocoa lemonade cider beer wine juice milk water soda champagne",
    # People.
    "family": "sister brother mother father aunt uncle cousin grandmother grandfather nephew niece daughter",
    "trades": (
        "plumber carpenter baker butcher tailor gardener painter mechanic electrician barber cook driver"
    ),
    "professions": (
        "teacher lawyer doctor dentist nurse accountant "
        "architect engineer librarian professor journalist pharmacist"
    ),
    "companions": (
        "neighbour friend colleague roommate landlord classmate "
        "guest partner boss secretary lodger babysitter"
    ),
    "athletes": (
        "goalkeeper striker swimmer sprinter boxer wrestler cyclist skier gymnast jockey rower archer"
    ),
    "officials": (
        "mayor judge sheriff minister senator ambassador captain colonel general sergeant bishop governor"
    ),
    # Money.
    "loans": "loan mortgage lease debt overdraft credit advance financing guarantee collateral bond pledge",
    "payments": (
        "payment deposit refund transfer discount rebate instalment subsidy grant allowance donation bonus"
    ),
    "fees": "fee fine tax toll commission surcharge penalty tariff levy premium charge rent",
    "papers": (
        "contract invoice receipt statement form certificate warranty voucher permit licence estimate bill"
    ),
    # Vehicles.
    "cars": "car truck van bus motorcycle bicycle scooter taxi tractor caravan limousine jeep",
    "boats": "boat ferry canoe yacht kayak sailboat raft steamer gondola barge dinghy submarine",
    "aircraft": (
        "plane helicopter glider balloon jet airship seaplane airliner zeppelin biplane rocket hovercraft"
    ),
    "trains": (
        "train tram subway metro funicular locomotive monorail sleeper streetcar express railcar trolley"
    ),
    # Things.
    "furniture": "sofa table chair wardrobe desk bookcase armchair cupboard dresser stool bench cradle",
    "appliances": "fridge oven toaster kettle blender freezer dishwasher microwave heater fan mixer dryer",
    "tools": "hammer drill saw ladder wrench screwdriver shovel axe rake chisel crowbar wheelbarrow",
    "textiles": "carpet curtain blanket pillow towel cushion rug quilt tablecloth mattress duvet napkin",
    "tableware": "plate cup bowl fork spoon knife glass mug saucer jug tray teapot",
    "garments": "shirt jacket coat sweater dress skirt blouse vest cardigan raincoat tunic hoodie",
    "jewels": "ring necklace bracelet brooch earring pendant locket tiara anklet medallion watch cufflink",
    "bags": "handbag backpack suitcase purse wallet briefcase basket satchel pouch rucksack trunk sack",
    # Looks, before a noun.
    "colours": "red blue green yellow purple orange pink brown grey black white turquoise",
    "fabrics": "woollen silk cotton leather velvet linen nylon denim satin suede felt canvas",
    "conditions": "dirty torn clean damp dusty stained faded wrinkled worn mended shabby soaked",
    "nations": (
        "french italian spanish german russian chinese japanese turkish greek mexican brazilian indian"
    ),
    # Music.
    "strings": "violin cello guitar harp banjo mandolin lute ukulele viola sitar zither balalaika",
    "winds": "flute clarinet trumpet oboe saxophone trombone bassoon tuba recorder harmonica piccolo bagpipe",
    "drums": (
        "drum gong cymbal tambourine triangle marimba xylophone bongo timpani snare castanet glockenspiel"
    ),
    "singers": "singer soprano tenor baritone alto choir quartet orchestra soloist rapper ensemble duo",
    # Times and activities, after "before", "after", "until" or "around".
    "months": "january february march april may june july august september october november december",
    "holidays": (
        "christmas easter halloween thanksgiving ramadan diwali "
        "passover carnival hanukkah midsummer pentecost advent"
    ),
    "daytimes": "dawn dusk noon midnight sunrise sunset nightfall daybreak midday sundown twilight bedtime",
    "duties": (
        "work school church class training practice rehearsal college court duty preschool kindergarten"
    ),
    "ballgames": (
        "tennis football basketball hockey golf volleyball cricket baseball rugby badminton squash handball"
    ),
    "outdoors": (
        "hiking swimming running climbing cycling skiing fishing camping sailing rowing jogging surfing"
    ),
    "chores": (
        "cleaning cooking ironing washing sweeping mopping dusting gardening shopping baking sewing vacuuming"
    ),
    "arts": (
        "painting singing dancing acting drawing writing sculpting weaving pottery carving sketching knitting"
    ),
    "sciences": (
        "physics chemistry biology algebra geometry astronomy "
        "geology botany zoology anatomy statistics calculus"
    ),
    "languages": "english danish polish dutch latin arabic hebrew mandarin korean finnish persian swedish",
    # Weather.
    "wet": "rain drizzle downpour mist fog flood shower dew humidity cloudburst moisture haze",
    "cold": "snow frost ice hail sleet blizzard slush freeze chill snowfall avalanche snowstorm",
    "gusts": "wind storm gale breeze hurricane tornado typhoon cyclone gust whirlwind thunderstorm tempest",
    "heat": "sunshine warmth drought heatwave sunlight glare thaw wildfire dryness brightness smog dust",
    # Film and stage.
    "films": (
        "comedy thriller western musical drama romance tragedy documentary cartoon mystery satire parody"
    ),
    "crafts": "plot ending dialogue script acting soundtrack editing lighting costume scenery trailer finale",
    "broadcasts": (
        "sitcom quiz newscast episode broadcast podcast interview debate commercial cabaret series show"
    ),
    "stages": "opera ballet concert recital play circus pantomime parade festival revue premiere pageant",
    # Feelings, after "felt".
    "joy": "happy cheerful joyful delighted glad merry thrilled elated jolly amused pleased proud",
    "sorrow": (
        "sad gloomy miserable tearful heartbroken lonely "
        "sorrowful mournful depressed unhappy hopeless downcast"
    ),
    "anger": "angry furious annoyed irritated bitter outraged enraged grumpy resentful cross hostile mad",
    "fear": "afraid scared anxious nervous worried frightened terrified uneasy tense shaky panicky timid",
    "weary": "tired sleepy bored exhausted weary drowsy listless drained sluggish lazy fatigued indifferent",
    # Manners.
    "fast": (
        "quickly rapidly swiftly hastily promptly briskly "
        "speedily hurriedly suddenly instantly immediately abruptly"
    ),
    "slow": (
        "slowly gradually lazily sluggishly hesitantly wearily "
        "sleepily reluctantly cautiously carefully patiently steadily"
    ),
    "loud": (
        "loudly noisily wildly fiercely boldly angrily "
        "proudly violently furiously dramatically passionately forcefully"
    ),
    "quiet": (
        "quietly softly silently gently calmly peacefully faintly discreetly secretly privately timidly shyly"
    ),
    "glad": (
        "happily cheerfully merrily joyfully gladly eagerly "
        "warmly kindly politely sweetly playfully gracefully"
    ),
    # Places, after "in" or "to".
    "capitals": "paris london berlin madrid vienna lisbon oslo dublin prague warsaw athens budapest",
    "countries": "norway peru kenya canada japan brazil egypt india mexico vietnam iceland morocco",
    "islands": "malta crete sicily corsica bermuda jamaica hawaii cuba madagascar tasmania bali mallorca",
    "regions": (
        "tuscany provence bavaria andalusia normandy scotland "
        "wales cornwall lapland catalonia flanders brittany"
    ),
    "states": "texas florida ohio california nevada oregon alaska kansas utah arizona montana vermont",
    # Spots, after "in the".
    "rooms": "kitchen bathroom bedroom hallway lounge attic cellar pantry nursery study parlour corridor",
    "grounds": "garden yard courtyard park orchard meadow greenhouse field forest valley vineyard pasture",
    "buildings": "library museum temple station hospital hotel cinema theatre factory warehouse castle barn",
    "shops": "bakery pharmacy market supermarket bookshop kiosk boutique grocery laundry salon cafe bar",
    # Body and health, after "my".
    "limbs": "knee shoulder elbow ankle wrist neck back hip thumb toe finger heel",
    "organs": "heart liver stomach kidney lung throat skin tongue bladder brain ear eye",
    "illnesses": (
        "fever cough flu asthma migraine headache rash allergy bronchitis pneumonia infection insomnia"
    ),
    "injuries": "fracture bruise burn cut sprain blister scar wound swelling bite scratch concussion",
    # Plants and animals.
    "flowers": "rose tulip daisy lily orchid violet sunflower poppy iris daffodil carnation marigold",
    "trees": "oak pine birch maple willow elm cedar beech chestnut poplar fir cypress",
    "pets": "cat dog hamster rabbit parrot goldfish kitten puppy canary tortoise gerbil poodle",
    "farm": "cow pig goat sheep hen horse donkey rooster goose bull pony mule",
    "wild": "wolf bear fox lion tiger elephant giraffe zebra monkey leopard hyena kangaroo",
    "birds": "eagle owl sparrow crow pigeon robin swan stork pelican falcon raven seagull",
    "insects": (
        "bee ant spider beetle butterfly moth wasp mosquito ladybird dragonfly grasshopper caterpillar"
    ),
}

# Category name -> its words, the most common ones first.
LEXICON: dict[str, tuple[str, ...]] = {name: tuple(words.split()) for name, words in _LISTS.items()}
