"""The toy KITTI: a procedural road scene in KITTI's look, written in KITTI's layout and labels.

Wide image, perspective, Car / Pedestrian / Cyclist, occlusion, DontCare, clutter that looks like
objects. Image n of a split depends on (seed, split, n) only, so a smaller toy holds the first
images of a larger one. data.py's own KITTI reader reads it.
"""
import json
import math
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

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
    stated = facts_of(root / "toy.json")
    if stated:                                          # nothing to write, also on a read-only disk
        check_facts(root / "toy.json", stated, seed, counts)
        return
    root.mkdir(parents=True, exist_ok=True)
    with locked(root, wait=True):
        stated = facts_of(root / "toy.json")            # another process may have made it meanwhile
        if stated:
            check_facts(root / "toy.json", stated, seed, counts)
        else:
            draw_all(root, seed, counts, workers)


def facts_of(marker):
    """What a marker says the folder holds; None where there is none, or one that was cut off."""
    try:
        return json.loads(marker.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def check_facts(marker, stated, seed, counts):
    """The facts that are asked for. Raises ValueError when the folder holds other ones."""
    counts = dict(counts or (stated or {}).get("counts") or COUNTS)
    wanted = {"version": VERSION, "seed": seed, "counts": counts}
    if stated not in (None, wanted):
        raise ValueError(f"{marker}: the folder holds a toy of {stated}, not {wanted}; delete it "
                         "or choose another root")
    return wanted


def draw_all(root, seed, counts, workers):
    """Draw what is missing in `root`, and say at the end what it holds."""
    begun = root / "toy.json.part"
    facts = check_facts(begun, facts_of(begun), seed, counts)
    names = {path.name for path in root.iterdir()}
    begun_by_us = names & {"toy.json", "toy.json.part"}   # also where a full disk left them empty
    if names and not begun_by_us:
        raise ValueError(f"{root}: not empty and not a toy; give an empty or new folder as the "
                         "toy's root")
    for folder in ("training/image_2", "training/label_2", "ImageSets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_text(begun, json.dumps(facts))
    numbers = {split: range(FIRST[split], FIRST[split] + count)
               for split, count in facts["counts"].items()}
    missing = [n for members in numbers.values() for n in members
               if not (root / f"training/image_2/{n:06d}.png").exists()]
    chunks = [missing[first:first + 25] for first in range(0, len(missing), 25)]
    draw = partial(write_images, root, seed, os.getpid())
    with tqdm(total=len(missing), desc="drawing the toy KITTI", unit="image",
              disable=len(missing) < 100) as bar:
        if workers > 1 and len(chunks) > 1:
            # Ctrl-C is for the parent alone: the workers end their chunk in silence, and the next
            # call goes on there.
            deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
            with ProcessPoolExecutor(workers, **deaf) as pool:
                for written in pool.map(draw, chunks):
                    bar.update(written)
        else:
            for chunk in chunks:
                bar.update(draw(chunk))
    for split, members in numbers.items():
        ids = "".join(f"{n:06d}\n" for n in members)
        write_text(root / "ImageSets" / f"{split}.txt", ids)
    os.replace(begun, root / "toy.json")


def write_images(root, seed, parent, numbers):
    """Draw some images. The PNG appears last and at once, so that a PNG means a finished image.

    parent: the process that asked; a worker whose parent was killed ends itself.
    """
    for number in numbers:
        if parent not in (os.getpid(), os.getppid()):
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
# Drawing
# ----------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 160, 48                                     # pixels
FOCAL, CAMERA = 93.0, 1.65                      # pixels (KITTI: 721 of 1242), metres above the road
MOODS = {                                       # light, colours of far air and sky, metres of sight
    "day": ((1.08, 1.05, 1.0), (196, 212, 228), (92, 148, 214), 140),
    "grey": ((.82, .86, .9), (176, 182, 188), (150, 158, 168), 90),
    "dusk": ((.9, .76, .68), (208, 166, 142), (96, 104, 158), 120),
    "night": ((.42, .46, .6), (44, 50, 76), (14, 18, 40), 80),
    "fog": ((.82, .85, .87), (190, 196, 200), (178, 186, 192), 26)}
OFTEN = ["day"] * 9 + ["grey"] * 4 + ["dusk"] * 3 + ["night"] * 2 + ["fog"] * 2
SKINS = [(228, 188, 160), (205, 160, 128), (160, 112, 82), (108, 74, 56)]
HAIR = [(40, 30, 24), (84, 56, 34), (176, 142, 84), (120, 116, 112), (24, 22, 22)]
CLOTHES = [(178, 42, 40), (38, 62, 128), (40, 40, 44), (222, 220, 214), (52, 104, 66),
           (206, 160, 54), (120, 84, 60),
           (118, 128, 140), (138, 62, 110), (224, 118, 46), (84, 140, 176)]
PAINTS = [(196, 30, 34), (28, 56, 120), (34, 35, 38), (232, 232, 230), (150, 154, 160),
          (96, 100, 106), (44, 86, 70),
          (188, 168, 132), (214, 150, 40), (94, 30, 44), (104, 150, 190)]
WALLS = [(172, 120, 96), (190, 174, 146), (146, 142, 140), (204, 196, 184), (128, 92, 78),
         (150, 160, 168),
         (196, 160, 110)]
LEAVES = [(58, 98, 50), (80, 108, 52), (120, 104, 48), (48, 82, 58)]
GLASS, TYRE = (58, 70, 84), (22, 22, 24)


def shade(rgb, factor):
    return tuple(channel * factor for channel in rgb)


class Scene:
    """What the camera sees, on two canvases of twice the final size.

    `picture` has the colours; `owner` has the number of the object that each pixel shows, from
    which boxes and occlusion are read.
    """

    def __init__(self, rng):
        self.rng = rng
        self.width, self.height = 2 * WIDTH, 2 * HEIGHT
        self.picture = Image.new("RGB", (self.width, self.height))
        self.owner = Image.new("L", (self.width, self.height))
        self.pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.owner)
        # where the road meets the horizon
        self.vanish = 2 * self.between(62, 98), 2 * self.between(14.5, 18.5)
        self.mood = self.pick(OFTEN)
        light, self.air, self.sky, sight = MOODS[self.mood]
        self.light = shade(light, self.between(.88, 1.12))
        self.sight = sight * self.between(.8, 1.25)
        self.road = self.pick([(96, 97, 100), (84, 85, 90), (112, 108, 104)])

    def between(self, low, high):
        return low + (high - low) * self.rng.random()

    def pick(self, choices):
        return choices[int(self.rng.random() * len(choices))]

    def colour(self, rgb, z, glow=False):
        """What is left of a colour in this light, z metres away; what glows needs no light."""
        clear = math.exp(-z / self.sight)
        (r, g, b), (lr, lg, lb), (ar, ag, ab) = rgb, (1, 1, 1) if glow else self.light, self.air
        haze = 1 - clear
        return (min(255, int(r * lr * clear + ar * haze)),
                min(255, int(g * lg * clear + ag * haze)),
                min(255, int(b * lb * clear + ab * haze)))


class Thing:
    """Draws around a foot on the road, x metres right of the camera, z ahead.

    Points are (right, up[, further]) in metres.
    number: the object's in `scene.owner`; 0 for clutter, which hides objects too; None for the
    backdrop.
    """

    def __init__(self, scene, x=0.0, z=0.0, number=None, flip=1):
        self.s, self.x, self.z, self.number, self.flip = scene, x, z, number, flip
        self.corners = []                              # canvas points drawn, also beyond the border

    def at(self, u, v, d=0.0):
        scale = 2 * FOCAL / (self.z + d)                            # canvas pixels a metre
        right, up = self.x + self.flip * u, CAMERA - v
        return self.s.vanish[0] + scale * right, self.s.vanish[1] + scale * up

    def draw(self, shape, points, rgb, d=0.0, glow=False, ink="fill", **how):
        self.corners += points
        getattr(self.s.pens[0], shape)(points, **{ink: self.s.colour(rgb, self.z + d, glow)}, **how)
        if self.number is not None:
            getattr(self.s.pens[1], shape)(points, **{ink: self.number}, **how)

    def poly(self, points, rgb, glow=False):
        self.draw("polygon", [self.at(*p) for p in points], rgb,
                  points[0][2] if len(points[0]) > 2 else 0, glow)

    def box(self, u0, v0, u1, v1, rgb, glow=False):
        self.poly([(u0, v0), (u1, v0), (u1, v1), (u0, v1)], rgb, glow)

    def oval(self, u, v, ru, rv, rgb, **how):
        (x0, y0), (x1, y1) = self.at(u - ru, v + rv), self.at(u + ru, v - rv)
        self.draw("ellipse", [(min(x0, x1), y0), (max(x0, x1), y1)], rgb, **how)

    def line(self, points, thick, rgb):
        self.draw("line", [self.at(*p) for p in points], rgb, width=self.pixels(thick))

    def pixels(self, metres):
        return max(1, round(metres * 2 * FOCAL / self.z))

    def shadow(self, ru):
        (x0, y0), (x1, y1) = self.at(-ru, 0, .35), self.at(ru, 0, -.25)
        dark = self.s.colour(shade(self.s.road, .8 if self.s.mood in ("grey", "fog") else .62),
                             self.z)
        self.s.pens[0].ellipse([(min(x0, x1), y0), (max(x0, x1), y1)], fill=dark)


def car_along(t, s):
    """A car along the road, going away (red lights) or coming (white); one flank shows."""
    away, paint = s.rng.random() < .55, s.pick(PAINTS)
    wide, roof, long = s.pick([(.86, 1.44, 4.1), (.84, 1.5, 3.7), (.94, 1.74, 4.4),
                               (.88, 1.48, 4.5)])
    waist, top, slim = .62 * roof, roof - .03, wide * .82
    # Metres from the near end to where the glass starts and meets the roof: hatchback, boot,
    # bonnet.
    first, last = s.pick([(.12, .7), (.55, 1.15)]) if away else (.95, 1.75)
    side = -math.copysign(1, t.x * t.flip)                          # the flank that the camera sees
    t.shadow(wide * 1.15)
    t.poly([(side * u, v, d) for u, v, d in (
        (wide, .22, 0), (wide, waist, 0), (wide, waist, first), (slim, top, last),
        (slim, top, long * .66), (wide, waist, long * .86), (wide, waist * .95, long),
        (wide, .22, long))],
           shade(paint, .72))
    t.poly([(side * u * wide, v, d) for u, v, d in (
        (.97, waist + .05, first + .35), (.86, top - .1, last + .15), (.86, top - .1, long * .62),
        (.97, waist + .05, long * .78))], GLASS)
    for d in (.75, long - .8):
        (x, y), (_, ground) = t.at(side * wide, .31, d), t.at(side * wide, 0, d)
        r = ground - y
        t.draw("ellipse", [(x - r * .32, y - r), (x + r * .32, y + r)], TYRE)
    t.poly([(-wide, waist, 0), (wide, waist, 0), (wide, waist, first), (-wide, waist, first)],
           shade(paint, 1.15))
    t.poly([(-wide, waist, first), (wide, waist, first), (slim, roof, last), (-slim, roof, last)],
           shade(paint, .95))
    t.poly([(-wide * .88, waist + .05, first), (wide * .88, waist + .05, first),
            (wide * .75, roof - .09, last),
            (-wide * .75, roof - .09, last)], s.pick([GLASS, GLASS, (120, 138, 154)]))
    for u in (-1, 1):
        t.box(u * wide * .92, 0, u * wide * .62, .32, TYRE)
    t.box(-wide, .24, wide, waist, paint)
    t.box(-wide, .22, wide, .4, shade(paint, .55))
    for u in (-1, 1):
        t.box(u * wide * .97, waist - .26, u * wide * .61, waist - .07,
              (214, 24, 24) if away else (250, 246, 216),
              glow=s.mood in ("night", "dusk"))
    t.box(-.26, .46, .26, .58, (226, 226, 206))
    if not away:
        t.box(-wide * .5, waist - .24, wide * .5, waist - .1, (26, 26, 28))


def car_across(t, s):
    """A crossing car's side, its nose towards u > 0."""
    paint, (long, roof) = s.pick(PAINTS), s.pick([(4.2, 1.44), (3.6, 1.5), (4.4, 1.7), (4.0, 1.46)])
    h, back, waist = long / 2, s.pick([.62, .9, .97]), .6 * roof    # saloon, hatchback, estate
    t.shadow(h * 1.04)
    t.poly([(-h, .3), (-h * .99, waist), (-h * back, waist + .05), (-h * (back - .2), roof),
            (h * .18, roof), (h * .5, waist + .04), (h * .92, waist - .06), (h, waist - .3),
            (h, .3), (h * .9, .2), (-h * .95, .2)],
           paint)
    t.poly([(-h, .3), (-h, .48), (h, .48), (h, .3), (h * .9, .2), (-h * .95, .2)],
           shade(paint, .68))
    t.poly([(-h * (back - .06), waist + .06), (-h * (back - .22), roof - .1), (-h * .14, roof - .1),
            (-h * .14, waist + .06)], GLASS)
    t.poly([(-h * .08, waist + .06), (-h * .08, roof - .1), (h * .15, roof - .1),
            (h * .42, waist + .06)], GLASS)
    for u in (-.6 * h, .62 * h):
        t.oval(u, .32, .33, .32, TYRE)
        t.oval(u, .32, .16, .16, (150, 152, 156))
    t.box(h * .9, waist - .26, h, waist - .1, (250, 244, 205), glow=s.mood == "night")
    t.box(-h, waist - .22, -h * .93, waist - .04, (200, 26, 26), glow=s.mood == "night")


def car(t, s):
    (car_across if s.rng.random() < .36 else car_along)(t, s)


def head(t, s, u, v, hats):
    t.oval(u, v, .115, .14, s.pick(SKINS))
    t.poly([(u - .125, v + .01), (u - .1, v + .13), (u, v + .17), (u + .1, v + .13),
            (u + .125, v + .03)], s.pick(hats))


def pedestrian(t, s):
    k, legs, coat = s.between(.89, 1.08), s.pick(CLOTHES), s.pick(CLOTHES)   # k: size beside 1.75 m
    stride, wide, hem = s.between(-.3, .3), s.between(.19, .25), s.pick([.8, .8, .55]) * k
    t.shadow(.34)
    if s.rng.random() < .25:
        # rucksack
        t.poly([(-.14, .9 * k), (-.34, .95 * k), (-.34, 1.38 * k), (-.12, 1.42 * k)],
               s.pick(CLOTHES))
    for u, tone in ((stride, .8), (-stride, 1)):
        t.line([(.1 * u, .82 * k), (.45 * u, .44 * k), (u, .05)], .15, shade(legs, tone))
        t.box(u - .07, 0, u + .13, .08, (30, 28, 28))
    t.line([(wide - .03, 1.38 * k), (wide + .05, 1.1 * k), (wide - stride * .5, .85 * k)], .09,
           shade(coat, .75))
    t.poly([(-wide, 1.4 * k), (-wide * .6, 1.47 * k), (wide * .6, 1.47 * k), (wide, 1.4 * k),
            (wide * .95, hem),
            (-wide * .95, hem)], coat)
    t.line([(-wide + .03, 1.38 * k), (-wide - .04, 1.1 * k), (-wide + stride * .5, .85 * k)], .1,
           shade(coat, .85))
    head(t, s, .02, 1.58 * k, HAIR)


def bike_across(t, s):
    frame = s.pick(CLOTHES)
    for u in (-.53, .53):
        (x0, y0), (x1, y1) = t.at(u - .34, .68), t.at(u + .34, 0)
        t.draw("ellipse", [(min(x0, x1), y0), (max(x0, x1), y1)], TYRE, ink="outline",
               width=t.pixels(.07))
    t.line([(-.53, .34), (-.12, .34), (.4, .86), (-.2, .82), (-.53, .34)], .06, frame)
    t.line([(-.12, .34), (-.22, .92)], .06, frame)
    t.line([(.53, .34), (.38, 1.02), (.52, 1.06)], .06, shade(frame, .7))
    t.box(-.34, .9, -.1, .97, (28, 26, 26))


def bike_along(t, s):
    t.oval(0, .35, .06, .35, TYRE)
    t.line([(0, .4), (0, 1.0)], .07, s.pick(CLOTHES))
    t.line([(-.3, 1.02), (.3, 1.02)], .06, (60, 60, 62))


def cyclist_across(t, s):
    coat, legs = s.pick(CLOTHES), s.pick(CLOTHES)
    lean, turn = s.between(.1, .3), s.between(0, 2 * math.pi)
    pedal = .17 * math.cos(turn), .17 * math.sin(turn)
    t.shadow(.8)
    for sign, tone in ((-1, .72), (1, 1)):                          # far leg, bike, near leg
        u, v = sign * pedal[0], sign * pedal[1]
        t.line([(-.2, .95), (.2 + u * .6, .68 + v * .5), (-.1 + u, .34 + v)], .145,
               shade(legs, tone))
        if sign < 0:
            bike_across(t, s)
    t.poly([(-.34, .92), (-.06, .9), (lean + .16, 1.36), (lean + .02, 1.5), (lean - .14, 1.46),
            (-.32, 1.12)], coat)
    t.line([(lean, 1.36), (lean + .16, 1.12), (.46, 1.05)], .1, shade(coat, .8))
    head(t, s, lean + .1, 1.62, s.pick([HAIR, CLOTHES]))            # a helmet has any colour


def cyclist_along(t, s):
    coat, legs, turn = s.pick(CLOTHES), s.pick(CLOTHES), s.between(-.14, .14)
    t.shadow(.4)
    bike_along(t, s)
    for u, lift in ((-.13, turn), (.13, -turn)):
        t.line([(u * .8, .95), (u * 1.25, .62 + lift), (u, .28 + lift)], .14, legs)
        t.box(u - .06, .2 + lift, u + .06, .3 + lift, (28, 28, 28))
    t.poly([(-.2, .86), (.2, .86), (.25, 1.38), (.13, 1.48), (-.13, 1.48), (-.25, 1.38)], coat)
    for u in (-1, 1):
        t.line([(u * .22, 1.36), (u * .33, 1.16), (u * .29, 1.02)], .1, shade(coat, .8))
    head(t, s, 0, 1.6, s.pick([HAIR, CLOTHES]))


def cyclist(t, s):
    (cyclist_across if s.rng.random() < .55 else cyclist_along)(t, s)


def round_sign(t, s):                                               # a head on a thin body
    top, face = s.between(1.6, 2.2), s.pick([(200, 30, 34), (34, 74, 160), (236, 190, 50)])
    t.box(-.05, 0, .05, top, (128, 130, 132))
    t.oval(0, top, .3, .3, face)
    t.oval(0, top, .19, .19, s.pick([(236, 236, 232), face]))


def bin_(t, s):                                                     # a coat without a head
    body = s.pick([(52, 84, 58), (70, 74, 80), (150, 96, 40), (40, 60, 104)])
    t.shadow(.36)
    t.poly([(-.24, 0), (.24, 0), (.3, .95), (-.3, .95)], body)
    t.box(-.33, .93, .33, 1.05, shade(body, .7))


def kiosk(t, s):                                                    # a car without wheels
    wall, top, h = s.pick(PAINTS), s.between(1.6, 2.3), s.between(.8, 1.5)
    t.shadow(h * 1.1)
    t.box(-h, 0, h, top, wall)
    t.box(-h, 0, h, .3, shade(wall, .5))
    for u in (-.5 * h, .5 * h):
        t.box(u - .36 * h, .55 * top, u + .36 * h, .85 * top, GLASS)
    t.box(-h * 1.08, top, h * 1.08, top + .15, s.pick(CLOTHES))


def hydrant(t, s):
    body = s.pick([(186, 36, 32), (214, 170, 40), (110, 112, 114)])
    t.box(-.15, 0, .15, .7, body)
    t.oval(0, .7, .16, .16, body)
    t.box(-.26, .4, .26, .55, shade(body, .8))


def bush(t, s):
    for _ in range(5):
        t.oval(s.between(-.7, .7), s.between(.3, .8), s.between(.3, .6), s.between(.25, .45),
               shade(LEAVES[0], s.between(.75, 1.2)))


# Usual height and width in metres, to find room; the drawing decides the box.
OBJECTS = {"Car": (car, 1.5, 2.6), "Pedestrian": (pedestrian, 1.74, .6),
           "Cyclist": (cyclist, 1.76, 1.0)}
CLUTTER = [round_sign, round_sign, bin_, kiosk, hydrant, bike_across, bike_across, bike_along, bush]


def backdrop(s):
    """Sky, clouds, hills, ground, the road with its marks, and a street on either side."""
    pen, horizon, world = s.pens[0], s.vanish[1], Thing(s)
    for y in range(0, int(horizon) + 2, 2):
        f = y / horizon
        pen.rectangle([0, y, s.width, y + 1],
                      fill=tuple(int(a * (1 - f) + b * f) for a, b in zip(s.sky, s.air)))
    for _ in range(0 if s.mood in ("night", "fog") else int(s.between(0, 5))):
        x, y = s.between(0, s.width), s.between(0, horizon * .7)
        for _ in range(4):
            u, r = x + s.between(-18, 18), s.between(2, 5)
            white = tuple(int(146 * min(1, s.light[1]) + .4 * a) for a in s.air)
            pen.ellipse([u - 2 * r, y - r, u + 2 * r, y + r * .8], fill=white)
    hills = [(x, horizon - s.between(1, 12)) for x in range(0, s.width + 1, 32)]
    pen.polygon([(0, horizon + 2), *hills, (s.width, horizon + 2)],
                fill=s.colour((84, 108, 92), 90))
    grass = s.pick([(96, 122, 66), (110, 112, 70), (128, 122, 112)])
    left, right, walk = -s.between(3.2, 6.5), s.between(3.2, 6.5), s.between(1.6, 3.2)

    def strip(x0, x1, z0, z1, rgb):
        world.poly([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], rgb)

    # in bands, each with its own haze
    for near, far in ((2.5, 5), (5, 9), (9, 16), (16, 30), (30, 60), (60, 300)):
        strip(-400, 400, near, far, grass)
        strip(left - walk, right + walk, near, far, (154, 150, 144))
        strip(left - .2, right + .2, near, far, (190, 188, 182))
        strip(left, right, near, far, s.road)
    middle, phase = (left + right) / 2 + s.between(-.5, .5), s.between(3.2, 9.2)
    for i in range(9):
        strip(middle - .08, middle + .08, phase + 6 * i, phase + 6 * i + 3, (226, 226, 220))
    if s.rng.random() < .2:                                         # a zebra crossing
        z = s.between(7, 16)
        for i in range(int(right - left)):
            strip(left + .3 + i, left + .8 + i, z, z + 2.2, (224, 224, 220))
    for side, edge in ((-1, left), (1, right)):
        street(s, world, side, edge + side * (walk + s.between(.3, 3)), s.between(.2, 1))


def street(s, world, side, x, built):
    """Houses (about a share `built`) and trees along x, from far to near."""
    slots, z = [], s.between(3, 8)
    while z < 70:
        slots.append((z, s.between(6, 14)))
        z += slots[-1][1] + s.between(0, 5)
    for z, length in reversed(slots):
        if s.rng.random() < built:
            wall, top, far, deep = s.pick(WALLS), s.between(4, 10), z + length, x + side * 10
            world.poly([(x, 0, z), (x, top, z), (deep, top, z), (deep, 0, z)], shade(wall, .8))
            world.poly([(x, 0, z), (x, top, z), (x, top, far), (x, 0, far)], wall)
            world.poly([(x, 0, z), (x, .8, z), (x, .8, far), (x, 0, far)], shade(wall, .75))
            for v in range(1, int(min(top - 1, 6)), 2) if z < 30 else ():
                for d in range(1, int(length - 1), 3):
                    lit = s.mood == "night" and s.rng.random() < .4
                    pane = (.3, 0), (1.5, 0), (1.5, 1.3), (.3, 1.3)
                    world.poly([(x, v + a, z + d + b) for a, b in pane],
                               (236, 196, 110) if lit else (74, 84, 96), lit)
        else:
            for d in (length * .75, length * .25):
                tree, high = Thing(s, x + side * s.between(0, 1.5), z + d), s.between(2.2, 3.6)
                green = shade(s.pick(LEAVES), s.between(.85, 1.2))
                tree.box(-.14, 0, .14, high, (84, 66, 52))
                for i in range(7):
                    tree.oval(s.between(-1, 1), high + s.between(-.4, 1.9), s.between(.6, 1.1),
                              s.between(.5, .9),
                              shade(green, .75 + .08 * i))


def draw_image(seed, number):
    """Scene `number` of a seed: a PIL image of 160x48 and its label lines.

    Depends on these two numbers only.
    """
    s = Scene(np.random.Generator(np.random.PCG64([seed, number])))
    backdrop(s)
    plan, taken = [], []                             # what to draw; rough boxes (x0, y0, x1, y1, z)

    def place(kind, draw, tall, wide, pixels, beside=False):
        """Find room where `tall` metres are `pixels` high; give up after six tries."""
        z = FOCAL * tall / pixels
        for _ in range(6):
            column = s.between(3, WIDTH - 3)
            x = (column - s.vanish[0] / 2) * z / FOCAL
            half, foot = wide * pixels / tall / 2, s.vanish[1] / 2 + CAMERA * pixels / tall
            mine = (column - half, foot - pixels, column + half, foot, z)
            free = all(rough_cover(mine, other) < .38 for other in taken)
            if free and (not beside or abs(x) > 2.5):
                taken.append(mine)
                plan.append((z, x, kind, draw, 1 if s.rng.random() < .5 else -1))
                return

    for _ in range(s.pick([1, 2, 3, 4, 5, 5, 6, 6, 7, 7])):
        kind = s.pick(["Car"] * 47 + ["Pedestrian"] * 29 + ["Cyclist"] * 24)
        place(kind, *OBJECTS[kind],
              10.4 * (OBJECTS[kind][1] * 17.5 / 10.4) ** (s.rng.random() ** 1.35))
    for _ in range(s.pick([0, 0, 1, 1, 2, 3])):                     # too far to label
        kind = s.pick(["Car", "Car", "Pedestrian", "Cyclist"])
        place(kind, *OBJECTS[kind], s.between(4, 8.5))
    for _ in range(s.pick([1, 2, 3, 4, 5])):
        place(None, s.pick(CLUTTER), 1.6, .8, 9 * 2.8 ** s.rng.random(), beside=s.rng.random() < .8)
    drawn = []
    for count, (z, x, kind, draw, flip) in enumerate(sorted(plan, key=lambda item: -item[0]), 1):
        thing = Thing(s, x, z, count if kind else 0, flip)
        draw(thing, s)
        if kind:
            # before nearer things
            drawn.append((kind, thing.corners, np.asarray(s.owner) == count, count))
    owner = np.asarray(s.owner)
    lines = [label_line(kind, corners, mask, owner == number)
             for kind, corners, mask, number in drawn if mask.any()]
    return develop(s), lines


def rough_cover(a, b):
    """Share of the farther of two rough boxes that the nearer covers."""
    far = a if a[4] > b[4] else b
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / ((far[2] - far[0]) * (far[3] - far[1]))


def label_line(kind, corners, mask, visible):
    """A line of KITTI's format, 3D columns unknown.

    What is too low, hidden or cut off to ask for is DontCare.
    mask: the object's pixels on the canvas, as if nothing stood in front; visible: those that the
    final picture shows.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0, x1, y1 = columns[0] / 2, rows[0] / 2, (columns[-1] + 1) / 2, (rows[-1] + 1) / 2
    xs, ys = zip(*corners)
    cut = max(0.0, 1 - (x1 - x0) * (y1 - y0) * 4 / ((max(xs) - min(xs)) * (max(ys) - min(ys))))
    hidden = 1 - visible.sum() / mask.sum()
    level = 0 if hidden < .05 else 1 if hidden < .25 else 2
    asked_for = y1 - y0 >= 10 and hidden <= .45 and cut <= .4
    head = f"{kind} {cut:.2f} {level}" if asked_for else "DontCare -1 -1"
    return f"{head} -10 {x0:.2f} {y0:.2f} {x1:.2f} {y1:.2f} -1 -1 -1 -1000 -1000 -1000 -10"


def develop(s):
    """Rain, then the canvas at half its size with the camera's contrast, brightness and noise."""
    if s.mood in ("grey", "fog") and s.rng.random() < .5:
        for _ in range(40):
            x, y, fall = s.between(0, s.width), s.between(0, s.height), s.between(4, 12)
            s.pens[0].line([x, y, x + fall * .2, y + fall], fill=s.air)
    pixels = np.asarray(s.picture.reduce(2), dtype=np.float32)      # (H, W, 3)
    pixels = (pixels - 110) * s.between(.85, 1.12) + 110 + s.between(-10, 12)
    noise = s.rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels += noise * s.between(1, 9 if s.mood == "night" else 6)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
