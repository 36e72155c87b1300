"""The toy KITTI: a procedural road scene in KITTI's look, written in KITTI's layout and labels.

Wide image, perspective, Car / Pedestrian / Cyclist, occlusion, DontCare, clutter that looks like
objects. Image n of a split depends on (seed, split, n) only, so a smaller toy holds the first
images of a larger one. data.py's own KITTI reader reads it.
"""
import json
import math
import multiprocessing
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from checkpoints import locked, write_text

COUNTS = {"train": 4000, "val": 500, "tune": 500}
FIRST = {"train": 0, "val": 100_000, "tune": 200_000}     # first image number of each split
VERSION = 1                                          # of the drawing: another one, another data set


# ----------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------

def make(root, seed=0, counts=None, workers=2):
    """Draw the toy into `root`, unless it is there; go on where an interrupted run stopped.

    counts: {split: images}; None: what is there, or COUNTS.
    workers: processes; they change no byte. Of several calls for one folder, the others wait.
    root/toy.json, written last, says what the folder holds. Raises ValueError where that is not
    what is asked for.
    """
    root = Path(root)
    marker = root / "toy.json"
    # A finished toy needs no lock, so that it may lie on a read-only disk.
    if stated_facts(marker, seed, counts):
        return
    root.mkdir(parents=True, exist_ok=True)
    with locked(root, wait=True):
        # Another process may have made it meanwhile.
        if not stated_facts(marker, seed, counts):
            draw_all(root, seed, counts, workers)
            os.replace(root / "toy.json.part", marker)


def stated_facts(marker, seed, counts):
    """What a marker says the folder holds; None without a marker, or with one that was cut off.

    Raises ValueError when that is not what is asked for.
    """
    try:
        stated = json.loads(marker.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    wanted = facts(seed, counts or stated.get("counts"))
    if stated != wanted:
        raise ValueError(f"{marker}: the folder holds a toy of {stated}, not {wanted}; delete it "
                         "or choose another root")
    return stated


def facts(seed, counts):
    return {"version": VERSION, "seed": seed, "counts": dict(counts or COUNTS)}


def draw_all(root, seed, counts, workers):
    """Draw what is missing in `root`; root/toy.json.part says what is being drawn."""
    begun = root / "toy.json.part"
    plan = stated_facts(begun, seed, counts) or facts(seed, counts)
    names = {path.name for path in root.iterdir()}
    # A full disk leaves a marker empty: the folder is ours all the same.
    if names and not names & {"toy.json", begun.name}:
        raise ValueError(f"{root}: not empty and not a toy; give an empty or new folder as the "
                         "toy's root")
    for folder in ("training/image_2", "training/label_2", "ImageSets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_text(begun, json.dumps(plan))
    missing = []
    for split, count in plan["counts"].items():
        members = range(FIRST[split], FIRST[split] + count)
        write_text(root / "ImageSets" / f"{split}.txt", "".join(f"{n:06d}\n" for n in members))
        missing += [n for n in members if not (root / f"training/image_2/{n:06d}.png").exists()]
    chunks = [missing[first:first + 25] for first in range(0, len(missing), 25)]
    draw = partial(write_images, root, seed)
    bar = tqdm(total=len(missing), desc="drawing the toy KITTI", unit="image",
               disable=len(missing) < 100)
    # Ctrl-C is for the parent alone: the workers end their chunk in silence, and the next call
    # goes on there.
    deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with bar, ProcessPoolExecutor(workers, **deaf) as pool:
        # The pool starts no process before it is used.
        alone = workers == 1 or len(chunks) == 1
        for written in (map if alone else pool.map)(draw, chunks):
            bar.update(written)


def write_images(root, seed, numbers):
    """Draw some images. The PNG appears last and at once, so that a PNG means a finished image.

    A worker whose parent was killed ends itself.
    """
    for number in numbers:
        parent = multiprocessing.parent_process()            # None in the process that asked
        if parent and not parent.is_alive():
            os._exit(1)
        image, lines = draw_image(seed, number)
        label = root / "training" / "label_2" / f"{number:06d}.txt"
        label.write_text("".join(line + "\n" for line in lines))
        final = root / "training" / "image_2" / f"{number:06d}.png"
        half = final.with_suffix(f".{os.getpid()}.part")
        image.save(half, format="PNG", compress_level=1)
        os.replace(half, final)
    return len(numbers)


# ----------------------------------------------------------------------------------------------
# The scene, and how a table is drawn into it
# ----------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 160, 48                         # pixels
WIDE, TALL = 2 * WIDTH, 2 * HEIGHT              # of the canvases that are drawn on
FOCAL, CAMERA = 93.0, 1.65                      # pixels (KITTI: 721 of 1242), metres above the road


def rgb(codes):
    """"c41e22 1c3878" -> [(196, 30, 34), (28, 56, 120)]."""
    return [tuple(bytes.fromhex(code)) for code in codes.split()]


# Light, colours of far air and of the sky, metres of sight.
MOODS = {
    "day": ((1.08, 1.05, 1.0), *rgb("c4d4e4 5c94d6"), 140),
    "grey": ((.82, .86, .9), *rgb("b0b6bc 969ea8"), 90),
    "dusk": ((.9, .76, .68), *rgb("d0a68e 60689e"), 120),
    "night": ((.42, .46, .6), *rgb("2c324c 0e1228"), 80),
    "fog": ((.82, .85, .87), *rgb("bec4c8 b2bac0"), 26),
}
OFTEN = ["day"] * 9 + ["grey"] * 4 + ["dusk"] * 3 + ["night"] * 2 + ["fog"] * 2
SKINS = rgb("e4bca0 cda080 a07052 6c4a38")
HAIR = rgb("281e18 543822 b08e54 787470 181616")
CLOTHES = rgb("b22a28 263e80 28282c dedcd6 346842 cea036 78543c 76808c 8a3e6e e0762e 548cb0")
PAINTS = rgb("c41e22 1c3878 222326 e8e8e6 969aa0 60646a 2c5646 bca884 d69628 5e1e2c 6896be")
WALLS = rgb("ac7860 beae92 928e8c ccc4b8 805c4e 96a0a8 c4a06e")
LEAVES = rgb("3a6232 506c34 786830 30523a")
ROADS = rgb("606164 54555a 706c68")
GRASS = rgb("607a42 6e7046 807a70")
TAILS, LAMPS, WHITE, LAMPLIGHT, PANE, HILLS = rgb("d61818 faf6d8 ecece8 ecc46e 4a5460 546c5c")
SCREENS = rgb("3a4654 3a4654 788a9a")
SIGNS = rgb("c81e22 224aa0 ecbe32")
BINS = rgb("34543a 464a50 966028 283c68")
HYDRANTS = rgb("ba2420 d6aa28 6e7072")
GLASS, TYRE = rgb("3a4654 161618")


def shade(colour, share):
    """A colour with a share of its brightness."""
    return tuple(channel * share for channel in colour)


def blend(a, share, b, rest):
    """A share of one colour and one of another, in whole numbers."""
    return tuple(min(255, int(x * share + y * rest)) for x, y in zip(a, b))


class Scene:
    """What the camera sees, on two canvases of twice the final size.

    `picture` has the colours; `owner` has the number of the object that each pixel shows, from
    which boxes and occlusion are read.
    """

    def __init__(self, rng):
        self.rng = rng
        self.picture = Image.new("RGB", (WIDE, TALL))
        self.owner = Image.new("L", (WIDE, TALL))
        self.pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.owner)
        # The point where the road meets the horizon, in canvas pixels.
        self.vanish = 2 * self.between(62, 98), 2 * self.between(14.5, 18.5)
        self.mood = self.pick(OFTEN)
        light, self.air, self.sky, sight = MOODS[self.mood]
        self.light = shade(light, self.between(.88, 1.12))
        self.sight = sight * self.between(.8, 1.25)
        road = self.pick(ROADS)
        dark = shade(road, .8 if self.mood in ("grey", "fog") else .62)
        # The colours that any table may name.
        self.colours = {"glass": GLASS, "tyre": TYRE, "road": road, "dark": dark}

    def between(self, low, high):
        return low + (high - low) * self.rng.random()

    def pick(self, choices):
        return choices[int(self.rng.random() * len(choices))]

    def chance(self, share):
        return self.rng.random() < share

    def colour(self, rgb, z, glow=False):
        """What is left of a colour in this light, z metres away; what glows needs no light."""
        lit = rgb if glow else [channel * light for channel, light in zip(rgb, self.light)]
        clear = math.exp(-z / self.sight)
        return blend(lit, clear, self.air, 1 - clear)


class Thing:
    """Draws tables around a foot on the road, x metres right of the camera, z ahead.

    number: the object's in `scene.owner`; 0 for clutter, which hides objects too; None for the
    backdrop.  flip: -1 mirrors what is drawn.  lit: colours with a "!" glow.
    """

    def __init__(self, scene, x=0.0, z=0.0, number=None, flip=1):
        self.s = scene
        self.x = x
        self.z = z
        self.number = number
        self.flip = flip
        self.lit = False
        self.given = dict(scene.colours)
        self.corners = []                       # canvas points drawn, also beyond the border

    def draw(self, table, **given):
        """Draw the rows of a table, each over those before it.

        A row has a shape (a method below), its colour, and the shape's numbers in metres. Points
        are right,up or right,up,further.

            box  paint*.7  -.62wide,0  wide,waist+.05

        A number stands for itself, or is a size of `given` with a factor before it and an offset
        behind it. A colour is a name of `given` or hexadecimal; *.7 darkens it; with ! it glows
        where the thing is lit. What is given stays known to later tables of the same thing.
        """
        self.given |= given
        for shape, name, share, glows, words in parsed(table):
            paint = shade(self.given.get(name) or bytes.fromhex(name), share)
            points = [[self.metres(*number) for number in word] for word in words]
            further = points[0][2] if len(points[0]) == 3 else 0
            colour = self.s.colour(paint, self.z + further, self.lit and glows)
            getattr(self, shape)(colour, *points)

    def metres(self, share, name, more):
        return share * self.given[name] + more if name else share

    # The shapes of a table. Each of a row's words is a list of numbers, also a single number.

    def poly(self, colour, *points):
        self.stroke("polygon", [self.at(*point) for point in points], fill=colour)

    def box(self, colour, a, b):
        """Upright, seen from the front; a and b are opposite corners."""
        self.poly(colour, a, (b[0], a[1]), b, (a[0], b[1]))

    def flat(self, colour, a, b):
        """On the ground; a and b are opposite corners."""
        self.poly(colour, a, (b[0], 0, a[2]), b, (a[0], 0, b[2]))

    def line(self, colour, thick, *points):
        """Through the points; the first word is its thickness."""
        self.stroke("line", [self.at(*point) for point in points], fill=colour,
                    width=self.pixels(*thick))

    def oval(self, colour, middle, radii):
        self.stroke("ellipse", self.around(*middle, *radii), fill=colour)

    def ring(self, colour, middle, radii):
        """The outline of an oval, 7 cm thick."""
        self.stroke("ellipse", self.around(*middle, *radii), outline=colour,
                    width=self.pixels(.07))

    def wheel(self, colour, middle, further):
        """Of a car seen from ahead or behind: a narrow oval that touches the road."""
        x, y = self.at(*middle, *further)
        _, ground = self.at(middle[0], 0, *further)
        r = ground - y
        self.stroke("ellipse", [(x - r * .32, y - r), (x + r * .32, y + r)], fill=colour)

    def shadow(self, colour, wide):
        """A shadow on the road under the thing: it hides nothing and belongs to no box."""
        corners = ordered(self.at(-wide[0], 0, .35), self.at(wide[0], 0, -.25))
        self.s.pens[0].ellipse(corners, fill=colour)

    # From metres to the canvas.

    def at(self, right, up, further=0.0):
        scale = 2 * FOCAL / (self.z + further)                      # canvas pixels a metre
        x, y = self.x + self.flip * right, CAMERA - up
        return self.s.vanish[0] + scale * x, self.s.vanish[1] + scale * y

    def around(self, right, up, wide, tall):
        """Two corners around an oval of these radii, left before right."""
        return ordered(self.at(right - wide, up + tall), self.at(right + wide, up - tall))

    def pixels(self, thick):
        return max(1, round(thick * 2 * FOCAL / self.z))

    def stroke(self, shape, points, width=1, **ink):
        """Draw in the picture, and in the owner's canvas with the number for a colour."""
        picture, owner = self.s.pens
        self.corners += points
        getattr(picture, shape)(points, width=width, **ink)
        if self.number is not None:
            getattr(owner, shape)(points, width=width, **dict.fromkeys(ink, self.number))


def ordered(a, b):
    """Two corners, left before right: a mirrored thing has them the other way round."""
    return [(min(a[0], b[0]), a[1]), (max(a[0], b[0]), b[1])]


@cache
def parsed(table):
    """A table's rows: shape, name and share of the colour, whether it glows, words of numbers."""
    rows = []
    for row in table.strip().splitlines():
        shape, colour, *words = row.split()
        name, _, share = colour.rstrip("!").partition("*")
        numbers = [[parts(number) for number in word.split(",")] for word in words]
        rows.append((shape, name, float(share or 1), colour.endswith("!"), numbers))
    return rows


def parts(number):
    """"-.62wide+.05" -> (-.62, "wide", .05)."""
    share, name, more = re.fullmatch(r"(-?[\d.]*)([a-z]*)([-+][\d.]+)?", number).groups()
    return float({"": 1, "-": -1}.get(share, share)), name, float(more or 0)


# ----------------------------------------------------------------------------------------------
# Objects and clutter: sizes by chance, then a table, from the farthest part to the nearest
# ----------------------------------------------------------------------------------------------

# Half the width, roof and length, in metres.
CARS = (.86, 1.44, 4.1), (.84, 1.5, 3.7), (.94, 1.74, 4.4), (.88, 1.48, 4.5)
# Length and roof of a crossing one.
CROSSING = (4.2, 1.44), (3.6, 1.5), (4.4, 1.7), (4.0, 1.46)
# Metres from the near end to where the glass starts and meets the roof.
HATCHBACK, BOOT, BONNET = (.12, .7), (.55, 1.15), (.95, 1.75)


def car_along(t, s):
    """A car along the road, going away (red lights) or coming (white); one flank shows."""
    away = s.chance(.55)
    paint = s.pick(PAINTS)
    wide, roof, long = s.pick(CARS)
    first, last = s.pick([HATCHBACK, BOOT]) if away else BONNET
    side = -math.copysign(wide, t.x * t.flip)                       # the flank that the camera sees
    t.lit = s.mood in ("night", "dusk")
    t.draw("""
        shadow dark       1.15wide
        poly   paint*.72  side,.22,0  side,waist,0  side,waist,first  slim,top,last \
                          slim,top,.66long  side,waist,.86long  side,.95waist,long  side,.22,long
        poly   glass      .97side,waist+.05,first+.35  .86side,top-.1,last+.15 \
                          .86side,top-.1,.62long  .97side,waist+.05,.78long
        wheel  tyre       side,.31  .75
        wheel  tyre       side,.31  long-.8
        poly   paint*1.15 -wide,waist,0  wide,waist,0  wide,waist,first  -wide,waist,first
        poly   paint*.95  -wide,waist,first  wide,waist,first  .82wide,roof,last  -.82wide,roof,last
        poly   screen     -.88wide,waist+.05,first  .88wide,waist+.05,first \
                          .75wide,roof-.09,last  -.75wide,roof-.09,last
        box    tyre       -.92wide,0  -.62wide,.32
        box    tyre       .92wide,0  .62wide,.32
        box    paint      -wide,.24  wide,waist
        box    paint*.55  -wide,.22  wide,.4
        box    lamp!      -.97wide,waist-.26  -.61wide,waist-.07
        box    lamp!      .97wide,waist-.26  .61wide,waist-.07
        box    e2e2ce     -.26,.46  .26,.58
        """, paint=paint, screen=s.pick(SCREENS), lamp=TAILS if away else LAMPS, wide=wide,
           roof=roof, waist=.62 * roof, top=roof - .03, first=first, last=last, long=long,
           side=side, slim=side * .82)
    if not away:
        t.draw("box 1a1a1c -.5wide,waist-.24 .5wide,waist-.1")


def car_across(t, s):
    """A crossing car's side, its nose towards the right."""
    paint = s.pick(PAINTS)
    long, roof = s.pick(CROSSING)
    half = long / 2
    back = s.pick([.62, .9, .97])                                   # saloon, hatchback, estate
    t.lit = s.mood == "night"
    t.draw("""
        shadow dark       1.04half
        poly   paint      -half,.3  -.99half,waist  -boot,waist+.05  -rear,roof  .18half,roof \
                          .5half,waist+.04  .92half,waist-.06  half,waist-.3  half,.3 \
                          .9half,.2  -.95half,.2
        poly   paint*.68  -half,.3  -half,.48  half,.48  half,.3  .9half,.2  -.95half,.2
        poly   glass      -low,waist+.06  -high,roof-.1  -.14half,roof-.1  -.14half,waist+.06
        poly   glass      -.08half,waist+.06  -.08half,roof-.1  .15half,roof-.1  .42half,waist+.06
        oval   tyre       -.6half,.32  .33,.32
        oval   96989c     -.6half,.32  .16,.16
        oval   tyre       .62half,.32  .33,.32
        oval   96989c     .62half,.32  .16,.16
        box    faf4cd!    .9half,waist-.26  half,waist-.1
        box    c81a1a!    -half,waist-.22  -.93half,waist-.04
        """, paint=paint, half=half, roof=roof, waist=.6 * roof, boot=half * back,
           rear=half * (back - .2), low=half * (back - .06), high=half * (back - .22))


def car(t, s):
    (car_across if s.chance(.36) else car_along)(t, s)


def head(t, s, right, up, hats):
    """Skin, and hair or a helmet."""
    t.draw("""
        oval   skin       u,v  .115,.14
        poly   hat        u-.125,v+.01  u-.1,v+.13  u,v+.17  u+.1,v+.13  u+.125,v+.03
        """, u=right, v=up, skin=s.pick(SKINS), hat=s.pick(hats))


def pedestrian(t, s):
    k = s.between(.89, 1.08)                                        # of 1.75 m
    legs = s.pick(CLOTHES)
    coat = s.pick(CLOTHES)
    stride = s.between(-.3, .3)
    wide = s.between(.19, .25)
    hem = s.pick([.8, .8, .55]) * k
    t.draw("shadow dark .34", k=k)
    if s.chance(.25):
        t.draw("poly rucksack -.14,.9k -.34,.95k -.34,1.38k -.12,1.42k", rucksack=s.pick(CLOTHES))
    t.draw("""
        line   legs*.8    .15  .1stride,.82k  .45stride,.44k  stride,.05
        box    1e1c1c     stride-.07,0  stride+.13,.08
        line   legs       .15  -.1stride,.82k  -.45stride,.44k  -stride,.05
        box    1e1c1c     -stride-.07,0  -stride+.13,.08
        line   coat*.75   .09  wide-.03,1.38k  wide+.05,1.1k  hand,.85k
        poly   coat       -wide,1.4k  -.6wide,1.47k  .6wide,1.47k  wide,1.4k  .95wide,hem \
                          -.95wide,hem
        line   coat*.85   .1  -wide+.03,1.38k  -wide-.04,1.1k  -hand,.85k
        """, legs=legs, coat=coat, stride=stride, wide=wide, hem=hem,
           hand=wide - stride * .5)
    head(t, s, .02, 1.58 * k, HAIR)


def bike_across(t, s):
    t.draw("""
        ring   tyre       -.53,.34  .34,.34
        ring   tyre       .53,.34  .34,.34
        line   frame      .06  -.53,.34  -.12,.34  .4,.86  -.2,.82  -.53,.34
        line   frame      .06  -.12,.34  -.22,.92
        line   frame*.7   .06  .53,.34  .38,1.02  .52,1.06
        box    1c1a1a     -.34,.9  -.1,.97
        """, frame=s.pick(CLOTHES))


def bike_along(t, s):
    t.draw("""
        oval   tyre       0,.35  .06,.35
        line   frame      .07  0,.4  0,1.0
        line   3c3c3e     .06  -.3,1.02  .3,1.02
        """, frame=s.pick(CLOTHES))


def cyclist_across(t, s):
    coat, legs = s.pick(CLOTHES), s.pick(CLOTHES)
    lean = s.between(.1, .3)
    turn = s.between(0, 2 * math.pi)
    t.draw("""
        shadow dark       .8
        line   legs*.72   .145  -.2,.95  -.6u+.2,-.5v+.68  -u-.1,-v+.34
        """, legs=legs, u=.17 * math.cos(turn), v=.17 * math.sin(turn))
    bike_across(t, s)
    t.draw("""
        line   legs       .145  -.2,.95  .6u+.2,.5v+.68  u-.1,v+.34
        poly   coat       -.34,.92  -.06,.9  lean+.16,1.36  lean+.02,1.5  lean-.14,1.46  -.32,1.12
        line   coat*.8    .1  lean,1.36  lean+.16,1.12  .46,1.05
        """, coat=coat, lean=lean)
    head(t, s, lean + .1, 1.62, s.pick([HAIR, CLOTHES]))            # a helmet has any colour


def cyclist_along(t, s):
    coat = s.pick(CLOTHES)
    legs = s.pick(CLOTHES)
    turn = s.between(-.14, .14)
    t.draw("shadow dark .4")
    bike_along(t, s)
    t.draw("""
        line   legs       .14  -.8u,.95  -1.25u,turn+.62  -u,turn+.28
        box    1c1c1c     -u-.06,turn+.2  -u+.06,turn+.3
        line   legs       .14  .8u,.95  1.25u,-turn+.62  u,-turn+.28
        box    1c1c1c     u-.06,-turn+.2  u+.06,-turn+.3
        poly   coat       -.2,.86  .2,.86  .25,1.38  .13,1.48  -.13,1.48  -.25,1.38
        line   coat*.8    .1  -.22,1.36  -.33,1.16  -.29,1.02
        line   coat*.8    .1  .22,1.36  .33,1.16  .29,1.02
        """, u=.13, turn=turn, legs=legs, coat=coat)
    head(t, s, 0, 1.6, s.pick([HAIR, CLOTHES]))


def cyclist(t, s):
    (cyclist_across if s.chance(.55) else cyclist_along)(t, s)


def round_sign(t, s):
    """Clutter: a head on a thin body."""
    top = s.between(1.6, 2.2)
    face = s.pick(SIGNS)
    t.draw("""
        box    808284     -.05,0  .05,top
        oval   face       0,top  .3,.3
        oval   inside     0,top  .19,.19
        """, top=top, face=face, inside=s.pick([WHITE, face]))


def bin_(t, s):
    """Clutter: a coat without a head."""
    t.draw("""
        shadow dark       .36
        poly   body       -.24,0  .24,0  .3,.95  -.3,.95
        box    body*.7    -.33,.93  .33,1.05
        """, body=s.pick(BINS))


def kiosk(t, s):
    """Clutter: a car without wheels."""
    wall = s.pick(PAINTS)
    top = s.between(1.6, 2.3)
    half = s.between(.8, 1.5)
    t.draw("""
        shadow dark       1.1half
        box    wall       -half,0  half,top
        box    wall*.5    -half,0  half,.3
        box    glass      -outer,.55top  -inner,.85top
        box    glass      inner,.55top  outer,.85top
        box    roof       -1.08half,top  1.08half,top+.15
        """, wall=wall, top=top, half=half, inner=.5 * half - .36 * half,
           outer=.5 * half + .36 * half, roof=s.pick(CLOTHES))


def hydrant(t, s):
    t.draw("""
        box    body       -.15,0  .15,.7
        oval   body       0,.7  .16,.16
        box    body*.8    -.26,.4  .26,.55
        """, body=s.pick(HYDRANTS))


def bush(t, s):
    for _ in range(5):
        t.draw("oval leaves u,v wide,tall", u=s.between(-.7, .7), v=s.between(.3, .8),
               wide=s.between(.3, .6), tall=s.between(.25, .45),
               leaves=shade(LEAVES[0], s.between(.75, 1.2)))


class Figure(NamedTuple):
    """Usual height and width in metres, to find room; the drawing decides the box."""
    kind: str                          # the class of an object; None for clutter
    draw: Callable                     # (Thing, Scene)
    tall: float
    wide: float


CAR = Figure("Car", car, 1.5, 2.6)
PEDESTRIAN = Figure("Pedestrian", pedestrian, 1.74, .6)
CYCLIST = Figure("Cyclist", cyclist, 1.76, 1.0)
CLUTTER = [Figure(None, draw, 1.6, .8) for draw in (
    round_sign, round_sign, bin_, kiosk, hydrant, bike_across, bike_across, bike_along, bush)]


# ----------------------------------------------------------------------------------------------
# The backdrop
# ----------------------------------------------------------------------------------------------

# Metres ahead where the ground's bands meet: each band has its own haze.
BANDS = (2.5, 5, 9, 16, 30, 60, 300)


def backdrop(s):
    """Sky, clouds, hills, ground, the road with its marks, and a street on either side."""
    sky(s)
    grass = s.pick(GRASS)
    left, right, walk = -s.between(3.2, 6.5), s.between(3.2, 6.5), s.between(1.6, 3.2)
    world = Thing(s)
    world.given |= dict(left=left, right=right, begin=left - walk, end=right + walk, grass=grass)
    road(s, world, left, right)
    street(s, -1, left - (walk + s.between(.3, 3)), s.between(.2, 1))
    street(s, 1, right + (walk + s.between(.3, 3)), s.between(.2, 1))


def sky(s):
    """A gradient down to the horizon, clouds by day, and hills."""
    pen = s.pens[0]
    horizon = s.vanish[1]
    for y in range(0, int(horizon) + 2, 2):
        f = y / horizon
        pen.rectangle([0, y, WIDE, y + 1], fill=blend(s.sky, 1 - f, s.air, f))
    white = blend((146, 146, 146), min(1, s.light[1]), s.air, .4)
    clouds = 0 if s.mood in ("night", "fog") else int(s.between(0, 5))
    for _ in range(clouds):
        x, y = s.between(0, WIDE), s.between(0, horizon * .7)
        for _ in range(4):
            u, r = x + s.between(-18, 18), s.between(2, 5)
            pen.ellipse([u - 2 * r, y - r, u + 2 * r, y + r * .8], fill=white)
    hills = [(x, horizon - s.between(1, 12)) for x in range(0, WIDE + 1, 32)]
    feet = horizon + 2
    pen.polygon([(0, feet), *hills, (WIDE, feet)], fill=s.colour(HILLS, 90))


def road(s, world, left, right):
    """Grass, pavements, kerbs and the road, with its marks."""
    for near, far in pairwise(BANDS):
        world.draw("""
            flat   grass      -400,0,near  400,0,far
            flat   9a9690     begin,0,near  end,0,far
            flat   bebcb6     left-.2,0,near  right+.2,0,far
            flat   road       left,0,near  right,0,far
            """, near=near, far=far)
    middle = (left + right) / 2 + s.between(-.5, .5)
    phase = s.between(3.2, 9.2)
    for i in range(9):
        world.draw("flat e2e2dc middle-.08,0,z middle+.08,0,z+3", middle=middle, z=phase + 6 * i)
    if s.chance(.2):                                                # a zebra crossing
        z = s.between(7, 16)
        for i in range(int(right - left)):
            world.draw("flat e0e0dc a,0,z b,0,z+2.2", a=left + .3 + i, b=left + .8 + i, z=z)


def street(s, side, x, built):
    """Houses (about a share `built`) and trees along x, from far to near."""
    slots = []
    z = s.between(3, 8)
    while z < 70:
        length = s.between(6, 14)
        slots.append((z, length))
        z += length + s.between(0, 5)
    for z, length in reversed(slots):
        if s.chance(built):
            house(s, side, x, z, length)
        else:
            tree(s, x + side * s.between(0, 1.5), z + length * .75)
            tree(s, x + side * s.between(0, 1.5), z + length * .25)


def house(s, side, x, z, length):
    """A front and the wall along the street, with windows when it is near."""
    world = Thing(s)
    wall = s.pick(WALLS)
    top = s.between(4, 10)
    world.draw("""
        poly   wall*.8    x,0,z  x,top,z  deep,top,z  deep,0,z
        poly   wall       x,0,z  x,top,z  x,top,far  x,0,far
        poly   wall*.75   x,0,z  x,.8,z  x,.8,far  x,0,far
        """, wall=wall, top=top, x=x, z=z, far=z + length, deep=x + side * 10)
    floors = range(1, int(min(top - 1, 6)), 2) if z < 30 else ()
    for floor in floors:
        for d in range(1, int(length - 1), 3):
            world.lit = s.mood == "night" and s.chance(.4)
            world.draw("poly pane! x,v+.3,z x,v+1.5,z x,v+1.5,z+1.3 x,v+.3,z+1.3",
                       x=x, v=floor, z=z + d, pane=LAMPLIGHT if world.lit else PANE)


def tree(s, x, z):
    """A trunk, and seven balls of leaves, the last the brightest."""
    thing = Thing(s, x, z)
    high = s.between(2.2, 3.6)
    green = shade(s.pick(LEAVES), s.between(.85, 1.2))
    thing.draw("box 544234 -.14,0 .14,high", high=high)
    for i in range(7):
        thing.draw("oval green u,v wide,tall", u=s.between(-1, 1), v=high + s.between(-.4, 1.9),
                   wide=s.between(.6, 1.1), tall=s.between(.5, .9),
                   green=shade(green, .75 + .08 * i))


# ----------------------------------------------------------------------------------------------
# One image
# ----------------------------------------------------------------------------------------------

# How many there are in an image, and which: an entry that stands twice is twice as frequent.
OBJECTS = 1, 2, 3, 4, 5, 5, 6, 6, 7, 7
TOO_FAR = 0, 0, 1, 1, 2, 3
KINDS = [CAR] * 47 + [PEDESTRIAN] * 29 + [CYCLIST] * 24
FAR_KINDS = CAR, CAR, PEDESTRIAN, CYCLIST


def draw_image(seed, number):
    """Scene `number` of a seed: a PIL image of 160x48 and its label lines.

    Depends on these two numbers only.
    """
    s = Scene(np.random.Generator(np.random.PCG64([seed, number])))
    backdrop(s)
    drawn = []
    far_first = sorted(choose(s), key=lambda spot: -spot.z)
    for count, (z, x, flip, figure, _) in enumerate(far_first, 1):
        thing = Thing(s, x, z, count if figure.kind else 0, flip)
        figure.draw(thing, s)
        if figure.kind:
            whole = np.asarray(s.owner) == count        # before nearer things hide some of it
            drawn.append((count, figure.kind, thing.corners, whole))
    owner = np.asarray(s.owner)
    lines = [label_line(*known, owner == count) for count, *known in drawn if known[-1].any()]
    return develop(s), lines


class Spot(NamedTuple):
    """Where a figure stands."""
    z: float                           # metres ahead
    x: float                           # metres right of the camera
    flip: int                          # -1: mirrored
    figure: Figure
    rough: tuple                       # about its box (x0, y0, x1, y1), in pixels


def choose(s):
    """The scene's spots: objects, objects too far to label, and clutter."""
    spots = []
    for _ in range(s.pick(OBJECTS)):
        figure = s.pick(KINDS)
        largest = figure.tall * 17.5
        place(s, spots, figure, 10.4 * (largest / 10.4) ** (s.rng.random() ** 1.35))
    for _ in range(s.pick(TOO_FAR)):
        place(s, spots, s.pick(FAR_KINDS), s.between(4, 8.5))
    for _ in range(s.pick(range(1, 6))):
        figure = s.pick(CLUTTER)
        pixels = 9 * 2.8 ** s.rng.random()
        place(s, spots, figure, pixels, beside=s.chance(.8))
    return spots


def place(s, spots, figure, pixels, beside=False):
    """Add a spot with room, where the figure is `pixels` high; give up after six tries.

    beside: not in the middle of the road.
    """
    z = FOCAL * figure.tall / pixels
    half = figure.wide * pixels / figure.tall / 2
    foot = s.vanish[1] / 2 + CAMERA * pixels / figure.tall
    for _ in range(6):
        column = s.between(3, WIDTH - 3)
        x = (column - s.vanish[0] / 2) * z / FOCAL
        rough = column - half, foot - pixels, column + half, foot
        free = all(rough_cover(z, rough, spot) < .38 for spot in spots)
        if free and (not beside or abs(x) > 2.5):
            spots.append(Spot(z, x, 1 if s.chance(.5) else -1, figure, rough))
            return


def rough_cover(z, rough, other):
    """Share of the farther of two rough boxes that the nearer covers."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = rough, other.rough
    wide = min(ax1, bx1) - max(ax0, bx0)
    tall = min(ay1, by1) - max(ay0, by0)
    x0, y0, x1, y1 = rough if z > other.z else other.rough
    return max(wide, 0) * max(tall, 0) / ((x1 - x0) * (y1 - y0))


def label_line(kind, corners, mask, visible):
    """A line of KITTI's format, 3D columns unknown.

    What is too low, hidden or cut off to ask for is DontCare.
    mask: the object's pixels on the canvas, as if nothing stood in front; visible: those that the
    final picture shows.
    """
    x0, y0, x1, y1 = np.array(Image.fromarray(mask).getbbox()) / 2
    drawn = np.ptp(corners, axis=0).prod()              # canvas pixels, beyond the border too
    cut = max(0.0, 1 - (x1 - x0) * (y1 - y0) * 4 / drawn)
    hidden = 1 - visible.sum() / mask.sum()
    level = 0 if hidden < .05 else 1 if hidden < .25 else 2
    asked_for = y1 - y0 >= 10 and hidden <= .45 and cut <= .4
    head = f"{kind} {cut:.2f} {level}" if asked_for else "DontCare -1 -1"
    return f"{head} -10 {x0:.2f} {y0:.2f} {x1:.2f} {y1:.2f} -1 -1 -1 -1000 -1000 -1000 -10"


def develop(s):
    """Rain, then the canvas at half its size with the camera's contrast, brightness and noise."""
    if s.mood in ("grey", "fog") and s.chance(.5):
        for _ in range(40):
            x, y, fall = s.between(0, WIDE), s.between(0, TALL), s.between(4, 12)
            s.pens[0].line([x, y, x + fall * .2, y + fall], fill=s.air)
    pixels = np.asarray(s.picture.reduce(2), dtype=np.float32)      # (H, W, 3)
    pixels = (pixels - 110) * s.between(.85, 1.12) + 110 + s.between(-10, 12)
    noise = s.rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels += noise * s.between(1, 9 if s.mood == "night" else 6)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
