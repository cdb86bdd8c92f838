"""Files of the Hugging Face Hub, by address in place of a path.

    hf://datasets/OWNER/NAME/FILE             of a data set
    hf://OWNER/NAME@REVISION/FILE             of a model, at a branch, tag or commit; without, at its main branch

Programs keep an address as it was typed, and the functions that open files ask `local_path` where it lies. It is
fetched by huggingface_hub, which timm brings, into that package's own cache (HF_HOME), once for all processes of a
node: they wait at a lock of the cache. No barrier of ours stands there, since a rank may open a file alone, and since a
download may last longer than ranks wait for one another.

A token set is more than its stream. What lies beside a fetched file is fetched by `fetch_beside`, where its reader
looks for it, at the commit of that file.
"""
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from utils import InputError, first_line, print0

PREFIX = 'hf://'
FORM = ('hf://datasets/OWNER/NAME@REVISION/FILE, or hf://OWNER/NAME@REVISION/FILE (@REVISION may be left out; for a '
        'branch with a slash it is a commit)')
# a revision with slashes is a pull request's, or one of those that the Hub makes, as refs/convert/parquet
ADDRESS = re.compile(r'hf://(datasets/)?([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?/([^/].*)')
DIGEST = 'sha256='  # behind the '#' of an address
_fetched = {}  # address -> where it lies: all of a run is of one commit, whatever becomes of a branch
_snapshots = {}  # folder -> Address of the files in it, without a file


class Address(NamedTuple):
    """Kind of repository ('dataset' or 'model'), its name with the owner's, branch or commit or None, path in it."""
    kind: str
    repository: str
    revision: str | None
    file: str


def is_on_hub(path: str | Path) -> bool:
    """Whether a path is an address of the Hub."""
    return str(path).startswith(PREFIX)


def parse(address: str) -> Address:
    """The parts of an address. Raises InputError for one of another form."""
    match = ADDRESS.fullmatch(address)
    if not match or match[2].startswith(('datasets/', 'spaces/', 'buckets/')):
        raise InputError(f'{address}: no address of a file: give {FORM}')
    return Address('dataset' if match[1] else 'model', match[2], match[3], match[4])


def local_path(path: str | Path) -> str | Path:
    """Where the file of an address lies on this node, fetched if it has to be; any other path as it is.

    Behind a '#' may stand 'sha256=' and 64 hexadecimal digits, with which the file is compared. Anything else there
    names parts of a file, and is kept.

    Raises:
        InputError: for an address of another form, for what cannot be fetched, and for another file than it should be.
    """
    if not is_on_hub(path):
        return path
    address, mark, part = str(path).partition('#')
    if address not in _fetched:
        _fetched[address] = _fetch(parse(address), address)
    if not part.startswith(DIGEST):
        return f'{_fetched[address]}{mark}{part}'
    if str(path) not in _fetched:  # compared once, since a large file takes seconds
        check_digest(_fetched[address], str(path))
        _fetched[str(path)] = _fetched[address]
    return _fetched[str(path)]


def digest_of_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def check_fragment(address: str) -> None:
    """InputError unless what stands behind the '#' of an address is a SHA-256."""
    if not re.fullmatch(f'{DIGEST}[0-9a-f]{{64}}', address.partition('#')[2]):
        raise InputError(f'{address}: after # may stand sha256= and 64 hexadecimal digits, and nothing else')


def check_digest(file: str | Path, address: str) -> None:
    """InputError unless a fetched file has the SHA-256 that stands behind the '#' of its address."""
    check_fragment(address)
    found = digest_of_file(file)
    if address.partition('#')[2] != DIGEST + found:
        raise InputError(f'{address}: what was fetched has SHA-256 {found}: fetch it again, or mistrust it')


def fetch_beside(path: Path) -> None:
    """Fetch a file to where it would lie beside a fetched one, if the repository has it; other paths are left alone.

    Raises:
        InputError: where that cannot be known.
    """
    folder = next((str(folder) for folder in path.parents if str(folder) in _snapshots), None)
    if folder is None or os.path.exists(path):
        return
    address = _snapshots[folder]._replace(file=path.relative_to(folder).as_posix())
    folder_of_kind = 'datasets/' if address.kind == 'dataset' else ''
    _fetch(address, f'{PREFIX}{folder_of_kind}{address.repository}@{address.revision}/{address.file}', optional=True)


def _fetch(address: Address, name: str, optional: bool = False) -> str:
    """The path in the cache, '' for an optional file that is not there. Raises InputError, which calls it `name`."""
    # here, since most runs need none of it
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import (EntryNotFoundError, GatedRepoError, HFValidationError, LocalEntryNotFoundError,
                                       RepositoryNotFoundError, RevisionNotFoundError)
    repository, revision = address.repository, address.revision
    advice = '; check its name, and if it is private log in with `hf auth login`'
    try:
        cached = try_to_load_from_cache(repository, address.file, revision=revision, repo_type=address.kind)
        if optional and cached is _CACHED_NO_EXIST:
            return ''
        if not optional and not isinstance(cached, str):
            print0(f'fetching {name}')
        path = hf_hub_download(repository, address.file, repo_type=address.kind, revision=revision)
    except GatedRepoError:
        raise InputError(f'{name}: {repository} is gated: accept its terms on its page, and log in with '
                         '`hf auth login`') from None
    except RepositoryNotFoundError:
        raise InputError(f'{name}: there is no {address.kind} {repository}{advice}') from None
    except RevisionNotFoundError:
        raise InputError(f'{name}: {repository} has no revision {revision}') from None
    except LocalEntryNotFoundError as error:  # neither in the cache nor within reach
        why = first_line(error.__cause__ or error).rstrip('.')
        raise InputError(f'{name}: is not in the cache, and cannot be fetched ({why}); check the network') from None
    except EntryNotFoundError:
        if optional:
            return ''
        raise InputError(f'{name}: {repository} has no file {address.file}'
                         + (f' at {revision}' if revision else '')) from None
    except HFValidationError as error:
        raise InputError(f'{name}: no address of a file ({first_line(error)}): give {FORM}') from None
    except Exception as error:  # of huggingface_hub's versions, each with another HTTP library, and of a full disk
        raise InputError(f'{name}: cannot be fetched ({first_line(error)})') from None
    root = Path(path).parents[address.file.count('/')]  # .../snapshots/COMMIT
    _snapshots[str(root)] = Address(address.kind, repository, root.name, '')
    return path
