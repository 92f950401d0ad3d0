"""Facts that a small language model may know, as (thing, answer); the raw material of the generated labelled sets.

Within a relation, another thing's different answer is always false. Things with several right answers (countries with
two capitals or continents, words with two opposites in the table) are left out.
"""

from __future__ import annotations


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """``thing=answer`` items separated by semicolons."""
    items = [item.strip().split("=") for item in text.split(";") if item.strip()]
    return tuple((thing, answer) for thing, answer in items)


CAPITALS = _pairs("""
France=Paris; Germany=Berlin; Italy=Rome; Spain=Madrid; Portugal=Lisbon; Greece=Athens; Austria=Vienna; Poland=Warsaw;
Hungary=Budapest; Ireland=Dublin; Norway=Oslo; Sweden=Stockholm; Finland=Helsinki; Denmark=Copenhagen; Belgium=Brussels;
Romania=Bucharest; Bulgaria=Sofia; Serbia=Belgrade; Croatia=Zagreb; Ukraine=Kyiv; Russia=Moscow; Turkey=Ankara;
Egypt=Cairo; Kenya=Nairobi; Ethiopia=Addis Ababa; Ghana=Accra; Nigeria=Abuja; Senegal=Dakar; Morocco=Rabat;
Tunisia=Tunis; Algeria=Algiers; Uganda=Kampala; Zimbabwe=Harare; Zambia=Lusaka; Somalia=Mogadishu; Sudan=Khartoum;
Japan=Tokyo; China=Beijing; India=New Delhi; Pakistan=Islamabad; Bangladesh=Dhaka; Nepal=Kathmandu; Thailand=Bangkok;
Vietnam=Hanoi; Cambodia=Phnom Penh; Mongolia=Ulaanbaatar; Iran=Tehran; Iraq=Baghdad; Syria=Damascus; Lebanon=Beirut;
Jordan=Amman; Qatar=Doha; Oman=Muscat; Afghanistan=Kabul; Canada=Ottawa; Mexico=Mexico City; Cuba=Havana;
Jamaica=Kingston; Haiti=Port-au-Prince; Peru=Lima; Chile=Santiago; Argentina=Buenos Aires; Brazil=Brasilia;
Colombia=Bogota; Ecuador=Quito; Venezuela=Caracas; Uruguay=Montevideo; Paraguay=Asuncion; Australia=Canberra;
New Zealand=Wellington; Fiji=Suva; Iceland=Reykjavik; Estonia=Tallinn; Latvia=Riga; Lithuania=Vilnius;
Slovakia=Bratislava; Slovenia=Ljubljana; Albania=Tirana; Libya=Tripoli; Angola=Luanda
""")

CONTINENTS = _pairs("""
France=Europe; Germany=Europe; Italy=Europe; Spain=Europe; Poland=Europe; Norway=Europe; Sweden=Europe; Ireland=Europe;
Hungary=Europe; Belgium=Europe; Kenya=Africa; Ghana=Africa; Nigeria=Africa; Senegal=Africa; Morocco=Africa;
Algeria=Africa; Uganda=Africa; Zambia=Africa; Ethiopia=Africa; Angola=Africa; Japan=Asia; China=Asia; India=Asia;
Pakistan=Asia; Nepal=Asia; Thailand=Asia; Vietnam=Asia; Cambodia=Asia; Mongolia=Asia; Iraq=Asia; Canada=North America;
Mexico=North America; Cuba=North America; Guatemala=North America; Honduras=North America; Peru=South America;
Chile=South America; Argentina=South America; Brazil=South America; Ecuador=South America; Uruguay=South America;
Paraguay=South America
""")

LANGUAGES = _pairs("""
Brazil=Portuguese; Mexico=Spanish; Argentina=Spanish; Chile=Spanish; Germany=German; Austria=German; Italy=Italian;
France=French; Japan=Japanese; China=Chinese; Russia=Russian; Poland=Polish; Hungary=Hungarian; Greece=Greek;
Turkey=Turkish; Egypt=Arabic; Jordan=Arabic; Sweden=Swedish; Denmark=Danish; Norway=Norwegian; Finland=Finnish;
Thailand=Thai; Vietnam=Vietnamese; England=English; Australia=English; Bulgaria=Bulgarian; Romania=Romanian;
Iceland=Icelandic
""")

YOUNG = _pairs("""
dog=puppy; cat=kitten; cow=calf; horse=foal; sheep=lamb; pig=piglet; goat=kid; deer=fawn; bear=cub; duck=duckling;
goose=gosling; hen=chick; frog=tadpole; swan=cygnet; kangaroo=joey; eagle=eaglet; owl=owlet; spider=spiderling
""")

ANIMALS = _pairs("""
whale=mammal; dolphin=mammal; bat=mammal; dog=mammal; horse=mammal; mouse=mammal; monkey=mammal; lion=mammal;
rabbit=mammal; bear=mammal; penguin=bird; sparrow=bird; hawk=bird; robin=bird; parrot=bird; pigeon=bird; swan=bird;
crow=bird; salmon=fish; trout=fish; tuna=fish; shark=fish; cod=fish; herring=fish; goldfish=fish; carp=fish;
beetle=insect; bee=insect; wasp=insect; mosquito=insect; butterfly=insect; grasshopper=insect; moth=insect;
snake=reptile; lizard=reptile; crocodile=reptile; turtle=reptile; python=reptile; chameleon=reptile; cobra=reptile
""")

OPPOSITES = _pairs("""
hot=cold; big=small; fast=slow; early=late; full=empty; open=closed; rich=poor; strong=weak; wet=dry; clean=dirty;
loud=quiet; day=night; up=down; love=hate; friend=enemy; first=last; win=lose; buy=sell; push=pull; give=take;
north=south; east=west; summer=winter; wide=narrow; deep=shallow; happy=sad; kind=cruel; cheap=expensive;
inside=outside; before=after; always=never; rough=smooth; true=false; left=right; tall=short; difficult=easy
""")

SYMBOLS = _pairs("""
gold=Au; silver=Ag; iron=Fe; copper=Cu; lead=Pb; tin=Sn; sodium=Na; potassium=K; hydrogen=H; oxygen=O; carbon=C;
nitrogen=N; helium=He; calcium=Ca; zinc=Zn; mercury=Hg; chlorine=Cl; magnesium=Mg; silicon=Si; sulfur=S; neon=Ne;
uranium=U; phosphorus=P; lithium=Li
""")

# question template -> its facts
RELATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "What is the capital of {}?": CAPITALS,
    "On which continent is {}?": CONTINENTS,
    "Which language do most people in {} speak?": LANGUAGES,
    "What is a young {} called?": YOUNG,
    "What kind of animal is a {}?": ANIMALS,
    "What is the opposite of {}?": OPPOSITES,
    "What is the chemical symbol of {}?": SYMBOLS,
}

# singular, plural: subjects of the subject-number set
SUBJECTS = _pairs("""
key=keys; book=books; picture=pictures; letter=letters; box=boxes; ship=ships; child=children; man=men; woman=women;
mouse=mice; tree=trees; bird=birds; student=students; painter=painters; doctor=doctors; knife=knives; wolf=wolves;
story=stories; city=cities; bridge=bridges; statue=statues; table=tables; guitar=guitars; horse=horses; actor=actors;
goose=geese; farmer=farmers; author=authors; lamp=lamps; bottle=bottles; chair=chairs; coin=coins; teacher=teachers;
soldier=soldiers; window=windows; car=cars; boat=boats; shirt=shirts; pilot=pilots; engine=engines
""")

# singular, plural: nouns between the subject and the probe (none is a subject)
ATTRACTORS = _pairs("""
cabinet=cabinets; garden=gardens; river=rivers; house=houses; road=roads; church=churches; wall=walls;
mountain=mountains; tower=towers; market=markets; fence=fences; lake=lakes
""")
