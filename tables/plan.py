"""The rows of the tables: image sets, tokenizers, token sets, trainings, evaluations, and the lines they make.

All tables of one --output-dir share rows: the same training is not repeated for another table.
"""
import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tables.presets import DATA, Preset, Tokenizer
from tables.rows import Command, Row

BYTES = 'bytes.json'  # of a row that makes a set
CHECKPOINT = 'checkpoint.pth'
EVALUATION = 'evaluation.json'  # of evaluate_on_images.py and main_pixels.py --eval
PROBE = 'probe.json'  # of scripts/probe.py
SEARCH = 'search'  # begins the names of lines of a search
SEARCH_SEED = 0  # whatever --seeds says: else another order of seeds would find another learning rate
PRETRAIN, FINETUNE = 'main_mtm_pretrain.py', 'main_mtm_finetune.py'
LAST = 'checkpoint-last.pth'  # of these two
LAYER_DECAY = 0.65  # published
TOKEN_ADAPT = 'tokenadapt.ckpt'


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        name: as it stands in the table.
        kind: what its learning rate goes by, of KINDS in presets.py, or what a table says; '' where nothing is trained.
        runs: rows by seed.
        measure: what is read of a run: 'top1' or 'images_per_second' (of log.txt), 'evaluated top1' (of EVALUATION),
            'knn top1' or 'linear top1' (of PROBE), or 'tasks' (of results.jsonl).
        files: what else the table says of it: by name, a row and the JSON file in its folder. 'bytes' are those of
            the training set, 'full_bytes' those that they are compared with, 'start_bytes' those of the set that its
            weights are pre-trained on.
        epochs: of a training.
        pretraining: epochs of the pre-training that it starts from.
        rate: of a line of the search, the learning rate that it tries.
        paper: the paper's value, or None.
        paper_size: its storage, or None.
        facts: what else the results hold of it, as plain values by name.
    """
    name: str
    kind: str
    runs: dict[int, Row]
    measure: str = 'top1'
    files: dict[str, tuple[Row, str]] = field(default_factory=dict)
    epochs: int = 0
    pretraining: int = 0
    rate: float | None = None
    paper: float | None = None
    paper_size: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """All rows that it is made of."""
        return [*(row for row, _ in self.files.values()), *self.runs.values()]


class Images(NamedTuple):
    """Images: the row that makes them, the paths for training and validation, and the training images' part of all."""
    row: Row
    path: Path
    val: Path
    share: float = 1.


class Tokens(NamedTuple):
    """Token files: the row that makes them; flags of main_seit.py; tokenizer and codebook; their part of all images."""
    row: Row
    flags: Command
    tokenizer: Tokenizer
    tokenizer_path: Path
    codebook: Path
    share: float = 1.


class Plan:
    """Makes rows, each once, by what they are about.

    Args:
        preset: sizes.
        data: the user's folder with train/ and val/.
        output: for all rows.
        device: --device of every program.
        lr: learning rate of all that is trained; None for the preset's.

    Attributes:
        output: for the rows of these images.
        root: for the rows of all.
        lrs, search: learning rates by kind, as the preset's.
        named: begins the names of trainings; '' but for those of another number of epochs.
        rows: made so far, by name; those that a row needs come before it.
    """

    def __init__(self, preset: Preset, data: Path, output: Path, device: str, lr: float | None = None):
        self.preset = preset
        self.data = data
        self.output = self.root = output
        self.device = ('--device', device)
        self.workers = ('--num-workers', str(preset.workers))
        self.lrs = dict.fromkeys(preset.lrs, lr) if lr else preset.lrs
        self.search = preset.search
        self.named = ''
        self.rows = {}

    def part(self, name: str, preset: Preset) -> 'Plan':
        """A plan of other images or epochs, whose rows are in a folder `name`; it shares tokenizers and `rows`."""
        plan = Plan(preset, self.data, self.root, self.device[1])
        plan.output = self.root / name
        plan.rows = self.rows
        return plan

    def row(self, name: str, commands: Iterable[Sequence[Any]], after: Sequence[Row] = ()) -> Row:
        """The row of a name below `output`, made when it is first asked for."""
        return self.row_in(self.output / name, commands, after)

    def row_in(self, folder: Path, commands: Iterable[Sequence[Any]], after: Sequence[Row] = ()) -> Row:
        """The row of a folder below `root`, which is its name."""
        name = folder.relative_to(self.root).as_posix()
        words = tuple(tuple(map(str, command)) for command in commands)
        return self.rows.setdefault(name, Row(name, folder, words, tuple(row.name for row in after)))

    # ------------------------------------------------------------ images

    def chosen(self) -> tuple[Row, ...]:
        """The row that chooses classes and images, where the preset takes a part of them."""
        if self.preset.classes is None:
            return ()
        out = self.output / 'chosen'
        skip = ('--skip-classes', self.preset.skip_classes) if self.preset.skip_classes else ()
        most = ('--images-per-class', self.preset.images_per_class) if self.preset.images_per_class else ()
        choose = ('tables/choose_images.py', '--classes', self.preset.classes, '--data-path')
        return (self.row('chosen', [
            (*choose, self.images / 'train', *most, '--output-dir', out / 'train', *skip),
            (*choose, self.images / 'val', '--output-dir', out / 'val', *skip)]),)

    @property
    def images(self) -> Path:
        """The user's folder with train/ and val/."""
        return self.data / self.preset.images

    def split(self, name: str) -> Path:
        """The images of 'train' or 'val'."""
        return (self.images if self.preset.classes is None else self.output / 'chosen') / name

    def full(self) -> Images:
        """All training images, as they are."""
        path = self.split('train')
        count = ('tables/count_bytes.py', '--data-path', path, '--output', self.output / 'images' / 'full' / BYTES)
        return Images(self.row('images/full', [count], self.chosen()), path, self.split('val'))

    def shrunk(self, method: str, parameter: float, side: int | None = None) -> Images:
        """The training images at a storage budget: scripts/shrink_images.py. But for samples, validation images too.

        `side` is the short side that images are resized to before.
        """
        name = f'images/{method}-{parameter:g}' + (f'-side-{side}' if side else '')
        sides = ('--side', side) if side else ()
        out = self.output / name

        def shrink(split: str, folder: Path) -> Command:
            return ('scripts/shrink_images.py', '--data-path', self.split(split), '--output-dir', folder, '--method',
                    method, '--parameter', f'{parameter:g}', *sides, '--seed', 0, *self.workers)

        path = out / 'set' / 'images'
        count = ('tables/count_bytes.py', '--data-path', path, '--output', out / BYTES)
        if method == 'sample':
            row = self.row(name, [shrink('train', out / 'set'), count], self.chosen())
            return Images(row, path, self.split('val'), parameter)
        row = self.row(name, [shrink('train', out / 'set'), shrink('val', out / 'val'), count], self.chosen())
        return Images(row, path, out / 'val' / 'images')

    # ------------------------------------------------------------ tokens

    def tokenizer(self, name: str) -> tuple[tuple[Row, ...], Path, Path]:
        """The rows that make a tokenizer, its path, and its codebook's."""
        tokenizer = self.preset.tokenizers[name]
        if not tokenizer.make:
            return (), self.data / 'weights' / tokenizer.file, self.data / 'tokens' / tokenizer.codebook
        out = self.root / 'tokenizers' / name
        device = self.device if tokenizer.make[0] == 'scripts/train_tokenizer.py' else ()
        words = [str(self.data / word.removeprefix(DATA)) if word.startswith(DATA) else word
                 for word in tokenizer.make]
        make = (*words, '--data-path', self.data / 'train', '--output-dir', out, *self.workers, *device)
        row = self.row_in(out, [make])
        return (row,), out / tokenizer.file, out / 'codebook.ckpt'

    def tokens(self, name: str, share: float = 1.) -> Tokens:
        """Token files of a tokenizer: of all images, or a sample."""
        if self.preset.published and share == 1 and name == next(iter(self.preset.tokenizers)):
            return self.published_tokens(name)
        after, tokenizer_path, codebook = self.tokenizer(name)
        tokenizer = self.preset.tokenizers[name]
        folder = self.output / 'tokens' / (name if share == 1 else f'{name}-{share:g}')
        tokenize = (*self.preset.launcher, 'tokenize_images.py', '--tokenizer-path', tokenizer_path,
                    '--codebook-path', codebook, '--image-size', tokenizer.image_size, *self.workers, *self.device)
        if share == 1:
            images = self.split('train')
            val = folder / 'val-token.data.bin.gz'
            synonyms = folder / 'synonyms.json'
            more = [(*tokenize, '--name', 'val', '--data-path', self.split('val'), '--output-dir', folder),
                    ('scripts/build_synonyms.py', '--codebook-path', codebook, '--output', synonyms)]
        else:
            sample = self.shrunk('sample', share)
            whole = self.tokens(name)
            after = (*after, sample.row, whole.row)
            images = sample.path
            val = Path(flag_value(whole.flags, '--val-token-file'))
            synonyms = flag_value(whole.flags, '--token-synonym-dict')
            more = []
        train = folder / 'train-token.data.bin.gz'
        row = self.row_in(folder, [
            (*tokenize, '--name', 'train', '--data-path', images, '--output-dir', folder), *more,
            ('tables/count_bytes.py', '--token-file', train, '--codebook-path', codebook, '--output', folder / BYTES),
        ], (*after, *self.chosen()))
        return Tokens(row, token_flags(train, val, codebook, synonyms), tokenizer, tokenizer_path, codebook, share)

    def compact(self, tokens: Tokens) -> Row:
        """The same training tokens in the compact format."""
        train = Path(flag_value(tokens.flags, '--train-token-file'))
        folder = tokens.row.folder.with_name(f'{tokens.row.folder.name}-compact')
        compact = folder / train.name.removesuffix('.gz')
        return self.row_in(folder, [
            ('scripts/convert_tokens.py', '--token-file', train, '--format', 'compact', '--output-dir', folder),
            ('tables/count_bytes.py', '--token-file', compact, '--codebook-path', tokens.codebook, '--output',
             folder / BYTES)], [tokens.row])

    def published_tokens(self, name: str) -> Tokens:
        """The published token files, or others that the user has, in DATA/tokens."""
        folder = self.data / 'tokens'
        codebook = folder / 'codebook.ckpt'
        train, val = (folder / f'{self.preset.published[split]}-token.data.bin.gz' if split in self.preset.published
                      else None for split in ('train', 'val'))
        row = self.row(f'tokens/{name}', [
            ('tables/count_bytes.py', '--token-file', train, '--codebook-path', codebook, '--output',
             self.output / 'tokens' / name / BYTES)])
        _, tokenizer_path, _ = self.tokenizer(name)
        return Tokens(row, token_flags(train, val, codebook, folder / 'synonyms.json'), self.preset.tokenizers[name],
                      tokenizer_path, codebook)

    def main_tokens(self, share: float = 1.) -> Tokens:
        """Those of the first tokenizer."""
        return self.tokens(next(iter(self.preset.tokenizers)), share)

    # ------------------------------------------------------------ trainings

    def epochs(self, share: float) -> tuple[int, int]:
        """Epochs, and those of the warm-up, on a part of the images."""
        times = 1 / share if self.preset.same_steps else 1
        return round(self.preset.epochs * times), round(self.preset.warmup_epochs * times)

    def train(self, line: str, lr: float, seed: int, words: Sequence[Any], after: Sequence[Row]) -> Row:
        """A training; `words` are its program and flags."""
        name = f'train/{self.named}{re.sub("[%,]", "", line).replace(" ", "-")}/lr-{lr:g}-seed-{seed}'
        end = ('--lr', f'{lr:g}', '--seed', seed, *self.device, '--output-dir', self.output / name, '--resume', 'auto')
        return self.row(name, [(*self.preset.launcher, *words, *end)], after)

    def token_words(self, tokens: Tokens, more: Sequence[str] = (), model: Sequence[str] = ()) -> Command:
        """Program and flags of a training on tokens; `more` of them win."""
        epochs, warmup = self.epochs(tokens.share)
        return ('main_seit.py', *tokens.flags, *self.evaluating(tokens.share, more), '--input-size',
                str(tokens.tokenizer.input_size), '--model', *(model or self.preset.token_model), '--epochs',
                str(epochs), '--warmup-epochs', str(warmup), *self.preset.training, *self.preset.tokens, *more)

    def pixel_words(self, images: Images, more: Sequence[str] = (), model: Sequence[str] = ()) -> Command:
        """Program and flags of a training on pixels; `more` of them win."""
        epochs, warmup = self.epochs(images.share)
        val = ('--val-path', str(images.val)) if self.preset.evaluated else ()
        return ('main_pixels.py', '--train-path', str(images.path), *val, *self.evaluating(images.share, more),
                *self.workers, '--model', *(model or self.preset.pixel_model), '--epochs', str(epochs),
                '--warmup-epochs', str(warmup), *self.preset.training, *self.preset.pixels, *more)

    def evaluating(self, share: float, more: Sequence[str]) -> Command:
        """The flags that say when a training on a part of the images is evaluated, before `more` flags."""
        if not self.preset.evaluated:
            return ('--no-eval',)
        if not self.preset.evaluations or '--no-eval' in more:
            return ()
        freq = self.epochs(share)[0] // self.preset.evaluations
        return ('--eval-freq', str(freq)) if freq > 1 else ()

    def token_line(self, name: str, seeds: Sequence[int], tokens: Tokens, more: Sequence[str] = (),
                   after: Sequence[Row] = (), **facts: Any) -> Line:
        """A line of trainings on tokens, after some rows."""
        words = self.token_words(tokens, more)
        runs = {seed: self.train(name, self.lrs['tokens'], seed, words, [tokens.row, *after]) for seed in seeds}
        return Line(name, 'tokens', runs, files={'bytes': (tokens.row, BYTES)}, epochs=self.epochs(tokens.share)[0],
                    **facts)

    def pixel_line(self, name: str, seeds: Sequence[int], images: Images, more: Sequence[str] = (),
                   **facts: Any) -> Line:
        """A line of trainings on pixels."""
        words = self.pixel_words(images, more)
        runs = {seed: self.train(name, self.lrs['pixels'], seed, words, [images.row]) for seed in seeds}
        return Line(name, 'pixels', runs, files={'bytes': (images.row, BYTES)}, epochs=self.epochs(images.share)[0],
                    **facts)

    def base_line(self, kind: str, seeds: Sequence[int], **facts: Any) -> Line:
        """The line of all images of a kind, which learning rates are chosen for."""
        if kind == 'tokens':
            return self.token_line('tokens', seeds, self.main_tokens(), **facts)
        if kind == 'pixels':
            return self.pixel_line('full pixels', seeds, self.full(), **facts)
        if kind == 'codes':
            return self.codes_line('MTM network, from scratch', seeds, self.preset.epochs, self.preset.warmup_epochs)
        return self.pretrained_line('pre-trained, equal epochs', seeds, self.equal_times)

    def search_lines(self, kinds: Iterable[str]) -> list[Line]:
        """The lines of the search for learning rates of some kinds: their base lines, at each rate with SEARCH_SEED."""
        lines = []
        for kind in kinds:
            for rate in self.search.get(kind, ()):
                plan = copy.copy(self)  # of the same rows
                plan.lrs = self.lrs | {kind: rate}
                if self.preset.search_epochs:
                    plan = plan.of_epochs(self.preset.search_epochs)
                line = plan.base_line(kind, [SEARCH_SEED])
                lines.append(replace(line, name=f'{SEARCH} {kind} {rate:g}', rate=rate, paper=None, paper_size=None))
        return lines

    def of_epochs(self, epochs: int) -> 'Plan':
        """A plan of the same rows, whose trainings take another number of epochs, and are named by it."""
        plan = copy.copy(self)
        plan.preset = replace(self.preset, epochs=epochs,
                              warmup_epochs=max(1, round(self.preset.warmup_epochs * epochs / self.preset.epochs)),
                              evaluations=self.preset.evaluations and (1 if epochs <= self.preset.epochs else epochs))
        plan.named = f'{epochs}-epochs/'
        return plan

    def group_lines(self, line: Line, val: Sequence[Any]) -> list[Line]:
        """The top-1 of a line's runs over each of the preset's groups of classes.

        Args:
            line: of trainings.
            val: program that evaluates, and the flags of its validation set.
        """
        if not self.preset.groups:
            return []
        lines = {}
        for seed, run in line.runs.items():
            name = f'groups/{run.name.removeprefix("train/")}'
            report = self.output / name / 'report'
            command = (*val, *self.device, *self.amp, '--eval', '--resume', run.folder / CHECKPOINT, '--no-model-ema',
                       '--report', report, '--output', self.output / name / 'all.json')
            evaluated = self.row(name, [command], [run])
            for group, classes in self.preset.groups.items():
                folder = f'{name}/{group}'
                command = ('tables/class_groups.py', '--report', report, '--group', group, *classes, '--output',
                           self.output / folder / EVALUATION)
                lines.setdefault(group, {})[seed] = self.row(folder, [command], [evaluated])
        return [Line(f'{line.name} ({group})', line.kind, runs, 'evaluated top1', epochs=line.epochs,
                     facts={'group': group, 'of': line.name}) for group, runs in lines.items()]

    # ------------------------------------------------------------ SeiT++

    def token_adapt(self, tokens: Tokens) -> tuple[tuple[Row, ...], Path | None]:
        """The rows that make TokenAdapt for a tokenizer, and its path; None where the preset does without."""
        make = self.preset.masked.token_adapt
        if make is None:
            return (), None
        if not make:
            return (), self.data / 'weights' / TOKEN_ADAPT
        tokenizer = tokens.tokenizer
        name = f'token-adapt/{tokens.row.name.removeprefix("tokens/")}'
        row = self.row(name, [(*make, '--data-path', self.data / 'train', '--image-size', tokenizer.image_size,
                               '--input-size', tokenizer.image_size, '--tokenizer-path', tokens.tokenizer_path,
                               '--codebook-path', tokens.codebook, *self.workers, *self.device, '--output-dir',
                               self.output / name)], [tokens.row])
        return (row,), self.output / name / TOKEN_ADAPT

    def masked_words(self, program: str, epochs: int, warmup: int, *more: Any) -> tuple[list, list[Row]]:
        """Program and flags of a SeiT++ program on the main tokens, and the rows that it needs."""
        masked = self.preset.masked
        tokens = self.main_tokens()
        rows, path = self.token_adapt(tokens)
        files, flags = tokens.flags, masked.finetune
        if program == PRETRAIN:  # needs no labels, and has nothing to validate
            files = [word for flag in ('--codebook-path', '--train-token-file')
                     for word in (flag, flag_value(files, flag))]
            flags = masked.pretrain
        return [program, *files, '--tokenadapt-path', path or '', '--input-size', tokens.tokenizer.input_size,
                '--epochs', epochs, '--warmup-epochs', warmup, *masked.batch, *flags, *more], [tokens.row, *rows]

    @property
    def tuning_epochs(self) -> int:
        """Of fine-tuning SeiT++."""
        return max(1, self.preset.epochs // self.preset.masked.tuning_part)

    def codes_line(self, name: str, seeds: Sequence[int], epochs: int, warmup: int) -> Line:
        """SeiT++'s network from scratch."""
        words, after = self.masked_words(FINETUNE, epochs, warmup, '--layer-decay', 1)
        runs = {seed: self.train(name, self.lrs['codes'], seed, words, after) for seed in seeds}
        return Line(name, 'codes', runs, files={'bytes': (after[0], BYTES)}, epochs=epochs)

    @property
    def equal_times(self) -> int:
        """How many times as long as fine-tuning is pre-training, where both take SeiT's epochs."""
        return self.preset.masked.tuning_part - 1

    def pretrained_line(self, name: str, seeds: Sequence[int], times: int, lr: float | None = None,
                        **facts: Any) -> Line:
        """SeiT++ for a part of SeiT's epochs, from pre-training for `times` as many; published: 100 of 300, from 400.

        `lr` is that of pre-training, by default the preset's first.
        """
        masked = self.preset.masked
        epochs = self.tuning_epochs
        runs = {}
        for seed in seeds:
            words, after = self.masked_words(PRETRAIN, times * epochs, max(1, times * epochs // 10))
            start = self.train(f'pre-training {times * epochs}', lr or masked.pretrain_lrs[0], seed, words, after)
            words, after = self.masked_words(FINETUNE, epochs, masked.warmup_epochs, '--layer-decay', LAYER_DECAY,
                                             '--finetune', start.folder / LAST)
            runs[seed] = self.train(name, self.lrs['fine-tuning'], seed, words, [*after, start])
        return Line(name, 'fine-tuning', runs, files={'bytes': (after[0], BYTES)}, epochs=epochs,
                    pretraining=times * epochs, **facts)

    # ------------------------------------------------------------ evaluations

    @property
    def amp(self) -> Command:
        """The precision of trainings, as flags of an evaluation; none where it is the default."""
        training = self.preset.training
        return ('--amp', flag_value(training, '--amp')) if '--amp' in training else ()

    def corrupted(self) -> tuple[tuple[Row, ...], Path]:
        """The validation images of table 3, and the row that chooses them where they are a part of all."""
        if self.preset.corrupted_images is None:
            return (), self.split('val')
        out = self.output / 'corrupted'
        choose = ('tables/choose_images.py', '--data-path', self.split('val'), '--images-per-class',
                  self.preset.corrupted_images, '--output-dir', out)
        return (self.row('corrupted', [choose], self.chosen()),), out

    def evaluation(self, kind: str, run: Row, name: str, data_path: Path, more: Sequence[str],
                   after: Sequence[Row] = ()) -> Row:
        """The row that evaluates a checkpoint on images, as pixels or, of a model of tokens, through the tokenizer.

        Args:
            kind: 'tokens' or 'pixels'.
            run: the training.
            name: of what it is evaluated on.
            data_path: the images.
            more: flags that say what is done to them.
            after: rows that make the images.
        """
        folder = f'evaluate/{kind}/{run.folder.name}/{name.replace(" ", "-")}'
        end = (*self.workers, *self.device, *self.amp, *more, '--output', self.output / folder / EVALUATION)
        if kind == 'tokens':
            tokens = self.main_tokens()
            size = tokens.tokenizer.image_size
            command = ('evaluate_on_images.py', '--model-path', run.folder / CHECKPOINT, '--model',
                       *self.preset.token_model, '--codebook-path', tokens.codebook, '--tokenizer-path',
                       tokens.tokenizer_path, '--tokenizer-input-size', size, '--vit-input-size',
                       tokens.tokenizer.input_size // 8, '--data-path', data_path, *end)
        else:
            command = ('main_pixels.py', '--eval', '--resume', run.folder / CHECKPOINT, '--no-model-ema', '--val-path',
                       data_path, '--model', *self.preset.pixel_model, *self.preset.pixels, *end)
        return self.row(folder, [command], [run, *after])

    def judged_tokens(self, name: str, tokens: Tokens) -> dict[str, tuple[Row, str]]:
        """What a table says of a tokenizer beside what is trained on its tokens, as Line's files.

        'codes' are the training set's in use, 'quality' PSNR and SSIM of the validation images, 'speed' the images
        that are tokenized a second.
        """
        quality, speed = f'quality/{name}', f'speed/{name}'
        files = ('--codebook-path', tokens.codebook, '--tokenizer-path', tokens.tokenizer_path)
        inspect = ('scripts/inspect_tokens.py', *files)
        train, val = (flag_value(tokens.flags, f'--{split}-token-file') for split in ('train', 'val'))
        inspected = self.row(quality, [
            (*inspect, '--token-file', train, '--output', self.output / quality / 'train.json'),
            (*inspect, '--token-file', val, '--data-path', self.split('val'), '--quality', '--quality-size',
             self.preset.quality_size, *self.workers, *self.device, '--output', self.output / quality / 'val.json')],
            [tokens.row])
        timed = self.row(speed, [
            ('benchmarks/encode.py', *files, '--image-size', tokens.tokenizer.image_size, '--amp', 'off', '--images',
             256, *self.workers, *self.device, '--output', self.output / speed / 'encode.json')], [tokens.row])
        return {'codes': (inspected, 'train.json'), 'quality': (inspected, 'val.json'),
                'speed': (timed, 'encode.json')}


def flag_value(words: Command, flag: str) -> str:
    """The word after a flag."""
    return words[words.index(flag) + 1]


def token_flags(train: Path, val: Path | None, codebook: Path, synonyms: Path | str) -> Command:
    """The flags of main_seit.py that name files, of which `val` may be None; labels lie beside the tokens."""
    flags = ['--codebook-path', str(codebook), '--token-synonym-dict', str(synonyms)]
    for split, path in (('train', train), ('val', val)):
        if path is None:
            continue
        labels = path.with_name(path.name.replace('-token.data.bin.gz', '-label.txt'))
        flags += [f'--{split}-token-file', str(path), f'--{split}-label-file', str(labels)]
    return tuple(flags)


def needed(rows: dict[str, Row], wanted: Iterable[Row]) -> list[Row]:
    """Some rows and all that they need, in the order of `rows`."""
    names = set()
    waiting = [row.name for row in wanted]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += rows[name].after
    return [row for name, row in rows.items() if name in names]


def percent(share: float) -> str:
    """0.6 -> '60%'."""
    return f'{math.floor(100 * share + 0.5)}%'
