"""Class folders of images: which images are in them, in the order of torchvision's ImageFolder.

The label of an image is the number of its class folder in alphabetical order, so that a hidden folder, a broken link or
an empty class would give all later classes other numbers: the first is ignored, the others are errors.
"""
import os
import stat
from collections import Counter
from pathlib import Path, PurePath

from image_data.decoding import IgnoredFiles, is_hidden, is_image
from utils import InputError


def read_folder(root: Path, ignored: IgnoredFiles) -> tuple[list[str], list[str], list[int]]:
    """Find the images in the class folders of `root`; what is left out is added to `ignored`.

    Returns:
        The classes in alphabetical order, the paths of the images relative to `root`, and their labels: the numbers
        of their classes.

    Raises:
        InputError: for a folder that cannot be read, no class folders, or a class without images.
    """
    classes = class_folders(root, ignored)
    if not classes:
        hint = f'; it has files ({_endings(os.listdir(root))}), which must be in a folder for each class'
        raise InputError(f'{root}: no class folders of images in it{hint if os.listdir(root) else ""}')
    names = []
    labels = []
    for label, name in enumerate(classes):
        images = images_in(root, name, ignored)
        if not images:
            visited = [file for _, _, files in os.walk(root / name) for file in files if not is_hidden(file)]
            contents = f' (it has {_endings(visited)} files)' if visited else ', it is empty'
            raise InputError(f'{root}: the class folder {name} holds no images{contents}; remove it, or put its images '
                             'there')
        names += images
        labels += [label] * len(images)
    return classes, names, labels


def holds_class_folders(root: Path) -> bool:
    """Whether a folder has class folders with an image in one of them."""
    ignored = IgnoredFiles()
    return any(images_in(root, name, ignored) for name in class_folders(root, ignored))


def class_folders(root: Path, ignored: IgnoredFiles) -> list[str]:
    """The names of the class folders in `root`, sorted."""
    names = []
    for entry in _entries(root):
        if is_hidden(entry.name):
            ignored.add(IgnoredFiles.HIDDEN, entry.name)
        elif not os.path.isdir(entry.path):
            if not os.path.exists(entry.path):
                raise InputError(f'{root}: {entry.name} is a link to nothing; mend or remove it, because a class '
                                 'that lacks would give the others other numbers')
            if is_image(entry.name):
                ignored.add(IgnoredFiles.LOOSE, entry.name)
        elif entry.is_symlink() and _leads_back(entry.path, root):
            ignored.add(IgnoredFiles.LINK, entry.name)
        else:
            names.append(entry.name)
    return names


def images_in(root: Path, class_name: str, ignored: IgnoredFiles) -> list[str]:
    """Paths, relative to `root`, of the images in one class folder and the folders below it, in ImageFolder's order.

    Links are followed, except to folders that are read anyway, so that none is read twice or without end.
    """
    files_of = []
    visited = set()
    folders = [class_name]
    links = []  # followed after all folders, so that an image is named by the folder it lies in, not by a link
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        identity = os.stat(root / folder)  # device and inode: the same by whatever path one comes
        if (identity.st_dev, identity.st_ino) in visited:
            ignored.add(IgnoredFiles.LINK, folder)
            continue
        visited.add((identity.st_dev, identity.st_ino))
        files = []
        for entry in _entries(root / folder):
            name = os.path.join(folder, entry.name)
            kind = _kind(entry, root)
            if kind == 'folder':
                folders.append(name)
            elif kind == 'link':
                links.append(name)
            elif kind == 'image':
                files.append(name)
            else:
                ignored.add(kind, name)
        files_of.append((folder, files))
    # ImageFolder sorts by folder first, then by file: 'a/z.jpg' comes before 'a-b/a.jpg'
    return [name for _, files in sorted(files_of) for name in files]


def _kind(entry: os.DirEntry, root: Path) -> str:
    """'folder', 'link' (to a folder), 'image', or why the entry of a class folder is left out."""
    if is_hidden(entry.name):
        return IgnoredFiles.HIDDEN
    if entry.is_symlink() and os.path.isdir(entry.path):
        return IgnoredFiles.LINK if _leads_back(entry.path, root) else 'link'
    if entry.is_dir(follow_symlinks=False):
        return 'folder'
    if not is_image(entry.name):
        return IgnoredFiles.OTHER
    # A link to nothing is an image that cannot be read: the reader will say so.
    regular = os.path.isfile(entry.path) or (entry.is_symlink() and not os.path.exists(entry.path))
    return 'image' if regular else IgnoredFiles.SPECIAL


def _leads_back(link: str, root: Path) -> bool:
    """Whether a link leads to `root`, above it, or to a folder in it that is read anyway."""
    target = os.path.realpath(link)
    real_root = os.path.realpath(root)
    if real_root == target or real_root.startswith(os.path.join(target, '')):
        return True
    return target.startswith(os.path.join(real_root, '')) and not is_hidden(os.path.relpath(target, real_root))


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=_entry_name)
    except OSError as error:
        raise InputError(f'{folder}: {error.strerror}') from None


def _entry_name(entry: os.DirEntry) -> str:
    return entry.name


def _endings(names: list[str]) -> str:
    """The most frequent endings of files, as in '.txt, .gif'."""
    counts = Counter(PurePath(name).suffix or 'unnamed' for name in names)
    return ', '.join(ending for ending, _ in counts.most_common(3))


def read_regular_file(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError; for a pipe or a device, which may have no end, too."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError('no regular file')
    return path.read_bytes()
