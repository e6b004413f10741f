"""Which images are likely of one slide, by what a slide lends to all its tiles, whatever they show:

    glass      the colour of the brightest pixels
    stains     the directions of the two stains in optical density (Macenko 2009)
    texture    sharpness, and noise of the two colour differences

and images that are nearly the same, turned and mirrored ones too, by a small grey thumbnail. Groups by likeness are a
guess. They cut a slide now and then, and join slides that were stained and scanned together.
"""

from collections.abc import Iterable

import numpy as np

from data.fault import Fault
from pretrain.probing.grouping import Groups, connected, joined
from pretrain.run.progress import track

TRAITS = 13
THUMBNAIL_SIDE = 16  # pixels a side
LOOKS_OF_AN_IMAGE = TRAITS + THUMBNAIL_SIDE**2
# Correlation of two thumbnails from which images count as the same. Of 1,900 colorectal tiles five pairs had more than
# .99, all of them turned or mirrored, and none had between .83 and that.
SAME_IMAGE = 0.95
LEAST_CONTRAST = 2.0  # standard deviation of a thumbnail's grey values; what is flatter looks like anything flat
SOME_COPIES = 0.01  # of the images: more that resemble one of another group, and the groups are no slides
TILES_PER_GROUP = 48
FEWEST_GROUPS = 10
SPARSELY = 7  # every so many pixels tell the stains
TISSUE = 0.45  # summed optical density from which a pixel counts as stained


def by_likeness(images: Iterable[np.ndarray | Fault], count: int) -> Groups:
    """By what a slide lends to its tiles: k-means over n images' `traits_of`, one group for each 48 images and at least
    ten; what is nearly the same image goes with the first of its like."""
    looked_at = track(images, count, "looking for slides", "images")
    return by_looks(
        np.stack([np.zeros(LOOKS_OF_AN_IMAGE) if isinstance(one, Fault) else looks_of(one) for one in looked_at])
    )


def by_looks(looks: np.ndarray) -> Groups:
    """As `by_likeness`, of n images' `looks_of`, float64 (n, 13 + 256)."""
    from sklearn.cluster import KMeans

    traits, thumbnails = looks[:, :TRAITS], looks[:, TRAITS:]
    traits = (traits - traits.mean(0)) / np.maximum(traits.std(0), 1e-6)
    groups = min(max(FEWEST_GROUPS, len(traits) // TILES_PER_GROUP), max(1, len(np.unique(traits, axis=0)) // 2))
    of = KMeans(groups, n_init=4, random_state=0).fit_predict(traits)
    alike = near_duplicates(thumbnails)
    first = np.unique(alike, return_index=True)[1]
    copies = len(alike) - len(first)
    how = f"{groups} groups of likely one slide, by glass, stains and texture"
    return Groups(
        of[first[alike]].astype(np.int64),
        how + (f", and {copies} near duplicates with what they resemble" if copies else ""),
        known=False,
    )


def with_copies(named: Groups, thumbnails: np.ndarray) -> Groups:
    """Groups that also keep near duplicates together, of n images' `thumbnail_of`, float64 (n, 256). A guess where more
    than one image in a hundred resembles one of another group: names that part copies tell no slides."""
    alike = near_duplicates(thumbnails)
    first = np.unique(alike, return_index=True)[1]
    elsewhere = int((named.of != named.of[first[alike]]).sum())
    if not elsewhere:
        return named
    how = f"{named.how}; {elsewhere} near duplicates with what they resemble in other groups"
    return Groups(joined(named.of, alike), how, named.known and elsewhere <= SOME_COPIES * len(alike))


def near_duplicates(thumbnails: np.ndarray, chunk: int = 256) -> np.ndarray:
    """A number for each of n `thumbnail_of`, float64 (n, 256): the same, int64 (n,) from 0, for those that correlate by
    more than .95, one of them turned or mirrored or not, and for those that are joined by one between."""
    count = len(thumbnails)
    small = thumbnails.astype(np.float32).reshape(count, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for turns in range(8):
        turned = np.rot90(small, turns % 4, (1, 2))[:, :, :: 1 - 2 * (turns // 4)].reshape(count, -1)
        for start in range(0, count, chunk):
            alike = small[start : start + chunk].reshape(-1, THUMBNAIL_SIDE**2) @ turned[start:].T > SAME_IMAGE
            pairs.append(np.argwhere(alike) + start)
    ends = np.concatenate(pairs)
    return connected(ends[:, 0], ends[:, 1], count)


def looks_of(image: np.ndarray) -> np.ndarray:
    """An image's `traits_of` and its `thumbnail_of`: uint8 (height, width, 3) → float64 (13 + 256,)."""
    return np.concatenate([traits_of(image), thumbnail_of(image)])


def thumbnail_of(image: np.ndarray) -> np.ndarray:
    """A grey thumbnail of mean 0 and length 1, float64 (256,); zeros for an image that is flat or smaller than it."""
    if min(image.shape[:2]) < THUMBNAIL_SIDE:
        return np.zeros(THUMBNAIL_SIDE**2)
    grey = image.astype(np.float64).mean(2)
    ends = [np.arange(THUMBNAIL_SIDE) * side // THUMBNAIL_SIDE for side in grey.shape]
    areas = np.outer(*(np.diff([*end, side]) for end, side in zip(ends, grey.shape, strict=True)))
    small = np.add.reduceat(np.add.reduceat(grey, ends[0], axis=0), ends[1], axis=1) / areas
    if small.std() < LEAST_CONTRAST:
        return np.zeros(THUMBNAIL_SIDE**2)
    return ((small - small.mean()) / (small.std() * THUMBNAIL_SIDE)).ravel()


def traits_of(image: np.ndarray) -> np.ndarray:
    """What a slide lends to a tile, whatever it shows: uint8 (height, width, 3) → float64 (13,); zeros for less than 3
    pixels a side."""
    if min(image.shape[:2]) < 3:
        return np.zeros(TRAITS)
    pixels = image.astype(np.float64)
    flat = pixels.reshape(-1, 3)
    grey = pixels.mean(2)
    edges = np.abs(4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:])
    noise = [np.abs(np.diff(pixels[..., channel] - grey, axis=1)).mean() for channel in (0, 2)]
    return np.concatenate(
        [
            np.percentile(flat, 99, axis=0) / 255,
            stains_of(flat[::SPARSELY]).ravel(),
            np.log(np.percentile(edges, [50, 90]) + 0.5),
            np.log(np.array(noise) + 0.1),
        ]
    )


def stains_of(pixels: np.ndarray) -> np.ndarray:
    """The two stains' directions in optical density, float64 (2, 3), the one that absorbs more red first (Macenko
    2009).

    The plane of the two largest principal components of the stained pixels (n, 3), and in it the 2nd and the 98th
    percentile of the angles. Zeros where hardly anything is stained.
    """
    density = -np.log((pixels + 1) / 256)
    stained = density[density.sum(1) > TISSUE]
    if len(stained) < 100:
        return np.zeros((2, 3))
    _, vectors = np.linalg.eigh(np.cov(stained.T))
    plane = vectors[:, :0:-1]
    plane = plane * np.where(plane[0] < 0, -1.0, 1.0)
    low, high = np.percentile(np.arctan2(*(stained @ plane).T[::-1]), [2, 98])
    stains = np.array([plane @ [np.cos(angle), np.sin(angle)] for angle in (low, high)])
    return stains[np.argsort(-stains[:, 0])]
