"""Class-incremental training with a replay memory of so many bytes: of tokens, pixels, small pixels or JPEGs.

On tokens:     python main_continual.py --new tokens --memory tokens --memory-bytes 1e6 --tokenizer-from-task 0 \\
                   --train-path IMAGES/train --val-path IMAGES/val --output-dir output/tokens
On pixels:     python main_continual.py --new pixels --memory jpeg --memory-quality 20 --memory-bytes 1e6 \\
                   --train-path IMAGES/train --val-path IMAGES/val --output-dir output/jpeg

Classes come in tasks; a task is trained on its own images and on what the memory holds of earlier ones, and evaluated
on all classes seen. Each task is a run in a folder of its own, so that the same command with --resume auto resumes a
killed run in the task and step that it was in. Further flags are those of main_seit.py for --new tokens, and those of
main_pixels.py for --new pixels. docs/continual.md has the protocol, and how bytes are counted.

Begin with `main`, which goes from task to task, and `train_task`, which is one of them. What differs between tokens and
pixels is a `Modality`, a tuple of functions that the rest calls.
"""
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before installed packages of the same names
import main_pixels
import main_seit
import models_seit
import recipe
from continual.forms import PixelStore, StoredImages, TaskImages, join_images, join_tokens, store_codes
from continual.memory import MAX_CLASSES, ReplayMemory, Sample, check_room, fill, save_memory
from continual.results import (MEMORY, RUN, add_result, check_new, digest_of, evaluate_seen, open_memory, read_results,
                               task_folder, write_results)
from continual.task_flags import NOT_HERE, add_task_flags, check_not_here, check_program_flags, check_task_flags
from continual.task_tokens import (TokenFiles, check_one_view, fit_tokenizer, hold_tokens, open_token_store,
                                   tokenize_splits)
from continual.tasks import Tasks, make_tasks, step_batches, step_draws, task_seed
from engine import evaluate_models, rank_indices
from fileio.files import check_same
from fileio.labels import check_class_names, count_classes
from flags import Parser, advice
from image_data.dataset import ImageDataset, Normalize, random_erasing
from image_data.overlap import note_shared_images
from image_data.sources import open_source
from image_tokenizer.tokenizing import check_folder
from token_augment import EvalTransform
from token_dataset import TokenDataset, choose_data_device, open_splits
from token_files.codebook import read_codebook
from token_files.published import codec_for
from token_files.made_with import identity_of_codebook, made_with
from training.checkpoints import SEEN, compare_flags, load_checkpoint, load_weights
from training.preemption import REQUEUE, StopSignal
from training.pretrained import freeze_all_but_attention, load_pretrained
from training.run_folder import FILES, RunFolder, find_checkpoint
from utils import InputError, check_same_on_all_ranks, init_distributed, on_main, print0, rank, run, world_size


NAMED = 5  # classes of a task that an error names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError, also for values that cannot work together."""
    parser = Parser('Class-incremental training with a replay memory. Further flags: main_seit.py --help for --new '
                    'tokens, main_pixels.py --help for --new pixels.')
    add_task_flags(parser)
    # flags of tasks are read here; what remains belongs to the program whose training this is
    task_args, rest = parser.parse_known_args(argv)
    check_task_flags(vars(task_args))
    # first, or the program would ask for what belongs to a flag that is none of this one
    program = main_pixels if task_args.new == 'pixels' else main_seit
    program_parser = program.get_args_parser()
    program_args, unknown = program_parser.parse_known_args(rest)
    check_not_here(vars(program_args))
    if unknown:  # said here, where the flags of both are known
        refused = {f'--{name.replace("_", "-")}' for name in NOT_HERE}
        lines = advice(rest, parser.flags() | program_parser.flags() - refused, program_parser.no_effect)
        raise InputError('; '.join([f'unrecognized arguments: {" ".join(unknown)}', *lines,
                                    f'see {parser.prog} --help']))
    if task_args.new == 'pixels':
        args = main_pixels.parse_args([*rest, '--train-path', task_args.train_path, '--val-path', task_args.val_path])
    else:
        args = main_seit.parse_args(rest)
    args = args.joined(task_args)
    check_program_flags(vars(args))
    return args


# ---------------------------------------------------------------- what is trained on

class Modality(NamedTuple):
    """What differs between tokens and pixels.

    Attributes:
        path: of the training set, for errors.
        train, val: data sets; their labels are positions in the order of the classes.
        input_shape: of one image, as the model reads it.
        make_model: () -> the model for all classes, on the CPU.
        make_augment: timm's Mixup or None -> ((inputs, labels), generator) -> model input, targets.
        prepare: inputs of an evaluation -> model input.
        store: number of a training image -> the Sample that memory holds of it.
        join: indices of training images, memory -> a data set of these and then of what memory holds.
        batches: such a set, indices (steps · B,), (seed, first step) -> their batches.
        val_stored: the images of `val` as the memory would give them back, for --eval-stored.
        made_with: of tokens: codebook and tokenizer, for checkpoints.
    """
    path: str
    train: TokenDataset | ImageDataset
    val: TokenDataset | ImageDataset
    input_shape: tuple[int, ...]
    make_model: Callable
    make_augment: Callable
    prepare: Callable
    store: Callable
    join: Callable
    batches: Callable
    val_stored: StoredImages | None = None
    made_with: dict[str, Any] | None = None


def make_tasks_of(args: argparse.Namespace, labels: dict[str, np.ndarray]) -> Tasks:
    """The tasks of the flags for the classes of data sets, by path; the training set first. Raises InputError."""
    classes = count_classes(labels, None, None, 'fix the labels')
    for path, values in labels.items():
        missing = np.setdiff1d(np.arange(classes), values)
        if len(missing):
            raise InputError(f'{path}: has no image of class {missing[0]}, and {len(missing)} such classes of '
                             f'{classes}: all are needed')
    if classes > MAX_CLASSES:
        raise InputError(f'{next(iter(labels))}: {classes} classes; a memory holds labels of {MAX_CLASSES} at most')
    return make_tasks(classes, args.base_classes, args.inc_classes, args.order_seed)


def token_modality(args: argparse.Namespace, device: torch.device) -> tuple[Modality, Tasks]:
    """Training on tokens, as in main_seit.py."""
    codebook = read_codebook(args.codebook_path).rows
    size = args.input_size // args.token_patch_size
    datasets = open_splits(recipe.split_files(args), codebook, args.codebook_path, args.token_cache, size, device)
    train_data, val_data = datasets['train'], datasets['val']
    for data in datasets.values():
        check_one_view(data)
    tasks = make_tasks_of(args, {args.train_label_file: train_data.labels, args.val_label_file: val_data.labels})
    for data in datasets.values():
        data.labels = tasks.positions(data.labels)  # from here on labels are positions in the order of the classes
    choose_data_device({'val': val_data}, args.data_device, device)
    codec = codec_for(len(codebook))

    # the head has all classes from the first task on, so that weights and EMA keep their shapes from task to task
    def make_model() -> nn.Module:
        return models_seit.create_model(args.model, args.model_kwargs, len(tasks.order), size, codebook.shape[1],
                                        args.stem, args.token_patch_size, args.drop, args.drop_path)

    def make_augment(mixup: Callable | None) -> Callable:
        augment = main_seit.make_augment(args, codebook, train_data.grid_size, size, device, mixup)
        return lambda batch, generator: augment(*batch, generator)

    def store(number: int) -> Sample:
        return store_codes(int(train_data.labels[number]), train_data.codes[number], codec)

    def join(indices: np.ndarray, memory: ReplayMemory) -> TokenDataset:
        joined = join_tokens(train_data, indices, memory.samples, codec)
        choose_data_device({'task': joined}, args.data_device, device)
        return joined

    def batches(data: TokenDataset, indices: np.ndarray, _: tuple) -> Iterator:
        return data.batches(indices, args.batch_size, device, args.pin_mem)

    return Modality(args.train_token_file, train_data, val_data, (codebook.shape[1], size, size), make_model,
                    make_augment, EvalTransform(codebook, size, device), store, join, batches,
                    made_with=made_with(train_data.files, codebook, args.codebook_path)), tasks


def pixel_modality(args: argparse.Namespace, device: torch.device) -> tuple[Modality, Tasks]:
    """Training on images, as in main_pixels.py."""
    train_data, val_data = (main_pixels.load_split(args, split) for split in ('train', 'val'))
    check_class_names(train_data.classes, val_data.classes, args.train_path, args.val_path)
    note_shared_images(train_data.source, val_data.source)
    for path in (args.train_path, args.val_path):
        check_folder(path, args.output_dir, train_data.classes)
    tasks = make_tasks_of(args, {args.train_path: train_data.labels, args.val_path: val_data.labels})
    images = {'train': train_data} | ({'val': val_data} if args.eval_stored else {})
    if args.memory == 'tokens':
        files = {split: (getattr(args, f'{split}_token_file'), getattr(args, f'{split}_label_file'))
                 for split in images}
        store = open_token_store(images, files, args.tokenizer_path, args.codebook_path, device)
    else:
        store = PixelStore(images, args.memory, args.memory_quality, args.memory_side)
    # the token store has compared the labels with those of its files, so they become positions only now
    for data in (train_data, val_data):
        data.labels = tasks.positions(data.labels)
    normalize = Normalize(device)

    def make_augment(mixup: Callable | None) -> Callable:
        erase = random_erasing(args.reprob, device)

        def augment(batch: tuple, generator: torch.Generator) -> tuple:
            x, labels = batch
            x = erase(normalize(x))
            return mixup(x, labels) if mixup else (x, labels)
        return augment

    def join(indices: np.ndarray, memory: ReplayMemory) -> ImageDataset:
        return join_images(train_data, indices, store.restore(memory.samples), memory.labels())

    def batches(data: ImageDataset, indices: np.ndarray, start: tuple[int, int]) -> Iterator:
        draws = step_draws((len(indices) // args.batch_size, args.batch_size), *start)
        return data.batches(indices, args.batch_size, device, args.pin_mem, draws)

    val_stored = StoredImages(val_data, 'val', store) if args.eval_stored else None
    return Modality(args.train_path, train_data, val_data, (3, args.input_size, args.input_size),
                lambda: main_pixels.create_model(args, len(tasks.order)), make_augment, normalize,
                lambda number: store.store('train', number), join, batches, val_stored), tasks


def make_tokens(args: argparse.Namespace, device: torch.device) -> tuple[argparse.Namespace, TokenFiles, str]:
    """Make the tokens that the flags ask for. Collective. Raises InputError.

    Returns:
        The flags with the paths of the token files, these files, and a text that says which tokenizer made them.
    """
    files = TokenFiles(args.tokenizer_path, args.codebook_path, '', args.train_token_file)
    if 'tokens' not in (args.new, args.memory) or files.train:
        return args, files, files.describe(False)
    folder = Path(args.tokens_dir or Path(args.output_dir, 'tokens'))
    splits = {'train': open_source(args.train_path, args.exif_rotate)}
    source = splits['train']
    check_folder(args.train_path, str(folder), source.classes, '--tokens-dir' if args.tokens_dir else '--output-dir')
    tasks = make_tasks_of(args, {args.train_path: source.labels})
    if args.new == 'tokens' or args.eval_stored:
        splits['val'] = open_source(args.val_path, args.exif_rotate)
    if args.new == 'tokens':  # a training on pixels looks at its images itself
        note_shared_images(source, splits['val'])
    with hold_tokens(folder):  # runs that differ in their memory may share the tokens; one makes them, others wait
        if args.tokenizer_from_task is not None:
            first = tasks.images(tasks.positions(source.labels), 0)
            files = fit_tokenizer(TaskImages(source, first, source.labels[first]), folder, args.image_size)
        files = tokenize_splits(files, folder, splits, args.image_size, device, args.max_image_pixels)
    paths = {'tokenizer_path': files.tokenizer, 'codebook_path': files.codebook, 'token_synonym_dict': files.synonyms,
             'train_token_file': files.train, 'train_label_file': files.train_labels,
             'val_token_file': files.val, 'val_label_file': files.val_labels}
    return args.replaced(**paths), files, files.describe(args.tokenizer_from_task is not None)


# ---------------------------------------------------------------- one task

def start_model(args: argparse.Namespace, modality: Modality, task: int) -> nn.Module:
    """The model that a task begins with: the last task's, or a new one."""
    model = modality.make_model()
    if task:  # its weights, not its EMA, and a new optimizer: each task is a training of its own
        path = str(task_folder(args.output_dir, task - 1) / FILES.newest[0])
        checkpoint = load_checkpoint(path)
        compare_flags(checkpoint, vars(args), path, args.rules.exact, args.rules.of_a_start)
        load_weights(model, checkpoint['model'], path)
    elif args.finetune:
        load_pretrained(model, args.finetune, new_head=True)  # classes come in another order, and one by one
    if args.attn_only:
        freeze_all_but_attention(model)
    return model


def steps_of(args: argparse.Namespace, modality: Modality, tasks: Tasks, task: int) -> int:
    """Batches in an epoch of a task: as many as its new images make. Raises InputError.

    The memory and --joint do not count, so that every way of remembering is trained for the same number of steps.
    """
    images = tasks.images(modality.train.labels, task)
    names = class_names(modality, tasks)
    first = [names[position] for position in tasks.classes(task)[:NAMED]]
    more = f' and {len(tasks.classes(task)) - NAMED} more' if len(tasks.classes(task)) > NAMED else ''
    source = f'{modality.path}: task {task + 1} of {len(tasks)}, of class {", ".join(first)}{more}'
    return recipe.count_steps(args, -(-len(images) // world_size()), source)


def class_names(modality: Modality, tasks: Tasks) -> list[str]:
    """The classes in their order, for errors: their names, or labels where they have none."""
    names = modality.train.classes
    return [repr(names[label]) if names else str(label) for label in tasks.order.tolist()]


def check_tasks(args: argparse.Namespace, modality: Modality, tasks: Tasks, device: torch.device) -> None:
    """InputError for what would end the run later: in its last task, or in the first one after its folder is made."""
    smallest = min(range(len(tasks)), key=lambda task: len(tasks.images(modality.train.labels, task)))
    steps_of(args, modality, tasks, smallest)
    begun = Path(args.output_dir, RUN).exists()
    model = (modality.make_model() if begun else start_model(args, modality, 0)).to(device)
    recipe.print_model(args, args.model, model, device)
    recipe.make_optimizer(args, model)
    if args.memory != 'none':
        check_room(args.memory_bytes, modality.train.labels, modality.store, args.memory,
                   class_names(modality, tasks))


def train_task(args: argparse.Namespace, modality: Modality, tasks: Tasks, task: int,
               device: torch.device) -> dict | None:
    """Train a task from where it was left, evaluate it, and fill the memory; returns its line of RESULTS.

    None where a signal stopped it, after saving.
    """
    path = task_folder(args.output_dir, task)
    folder = RunFolder(str(path), args.save_every)
    checkpoint, checkpoint_path = find_checkpoint(str(path), 'auto')

    # data
    memory = open_memory(args.output_dir, task, args.memory, args.memory_bytes)
    images = tasks.images(modality.train.labels, task)
    trained_images = tasks.images(modality.train.labels, task, args.joint)  # with --joint of all classes so far
    data = modality.join(trained_images, memory)
    steps = steps_of(args, modality, tasks, task)
    seen = tasks.ends[task]
    print0(f'task {task + 1} of {len(tasks)}: {len(tasks.classes(task))} new classes, {seen} in all, '
           f'{len(trained_images):,} images, and {len(memory):,} in {memory.size:,} bytes of memory')

    # model and optimizer
    state = recipe.make_state(args, start_model(args, modality, task).to(device), device, modality.input_shape,
                              steps, {SEEN: seen})
    recipe.resume_run(args, state, checkpoint, checkpoint_path, steps)

    # loss: over the classes seen so far, which are the model's first outputs
    mixup, criterion = recipe.make_loss(args, seen)
    augment = modality.make_augment(mixup)

    def loss_of(model: nn.Module, batch: tuple, generator: torch.Generator) -> torch.Tensor:
        x, targets = augment(batch, generator)
        return criterion(model(x)[:, :seen], targets)

    seed = task_seed(args.seed, task)

    def order_of(epoch: int) -> np.ndarray:
        # batches of all ranks together, from which each takes every world_size-th image
        batches = step_batches(len(trained_images), len(memory), args.batch_size * world_size(), args.replay_share,
                               range(epoch * steps, (epoch + 1) * steps), seed)
        return batches[:, rank()::world_size()].ravel()

    def batches_of(indices: np.ndarray, epoch: int, start: int) -> Iterator:
        return modality.batches(data, indices, (seed, epoch * steps + start))

    # train, evaluate, and only then let the task's images pass by the memory
    # in the order of the outputs, which numbers alone would hide
    names = [modality.train.classes[label] if modality.train.classes else str(label) for label in tasks.order.tolist()]
    if recipe.fit(args, state, folder, steps, order_of, batches_of, loss_of, classes=names,
                  made_with=modality.made_with, seed=seed):
        return None
    stats = evaluate_models(state, make_evaluate(args, modality, tasks, task, device, state.amp))
    if args.memory != 'none':
        too_large = fill(memory, args.memory_policy, images, modality.train.labels, modality.store, (args.seed, task))
        if too_large:
            print0(f'note: {too_large} images are not stored, for each takes more than an equal share of the memory '
                   'for a class')
        on_main(save_memory, memory, path / MEMORY)
    counts = np.bincount(memory.labels(), minlength=seen)
    return {'task': task, 'classes': seen, 'new_images': len(images),
            'steps': args.epochs * steps // args.accum_iter, **stats,
            'memory_images': len(memory), 'memory_bytes': memory.size,
            'memory_images_per_class': [int(counts.min()), int(counts.max())]}


def make_evaluate(args: argparse.Namespace, modality: Modality, tasks: Tasks, task: int, device: torch.device,
                  amp: str) -> Callable:
    """The engine's evaluate_of after a task: on the validation images of all classes seen, and on them as stored."""
    seen = np.flatnonzero(modality.val.labels < tasks.ends[task])
    indices = seen[rank_indices(len(seen), args.dist_eval)]
    sets = {'': modality.val} | ({'stored': modality.val_stored} if modality.val_stored else {})

    def evaluate_of(model: nn.Module, name: str) -> dict[str, Any]:
        stats = {}
        for form, data in sets.items():
            batches = data.batches(indices, int(1.5 * args.batch_size), device, args.pin_mem)
            form_stats = evaluate_seen(model, tasks, task, modality.val.labels[indices], batches,
                                    prepare=modality.prepare, amp=amp, distributed=args.dist_eval,
                                    name=' '.join(filter(None, (name, form))))
            stats |= {f'{form}_{key}' if form else key: value for key, value in form_stats.items()}
        return stats
    return evaluate_of


# ---------------------------------------------------------------- the program

def identity_of(args: argparse.Namespace, modality: Modality, tasks: Tasks, tokenizer: str) -> dict[str, Any]:
    """What must be the same when a run resumes, by name: flags, data, tokenizer and codebook."""
    flags = ('new', 'joint', 'memory', 'memory_bytes', 'memory_policy', 'memory_quality', 'memory_side',
             'replay_share', 'base_classes', 'inc_classes', 'order_seed', 'epochs', 'eval_stored')
    sets = {name: data.source.digest() if args.new == 'pixels' else digest_of(data.codes, tasks.order[data.labels])
            for name, data in (('training images', modality.train), ('validation images', modality.val))}
    return {**{f'--{name.replace("_", "-")}': getattr(args, name) for name in flags}, 'classes': len(tasks.order),
            **sets, 'tokenizer': tokenizer,
            'codebook': identity_of_codebook(args.codebook_path)['sha256'] if args.codebook_path else None}


def facts_of_data(args: argparse.Namespace, modality: Modality) -> dict[str, Any]:
    """What ranks, and a resumed run, must have the same beside that: sizes of images, synonyms, TokenAdapt."""
    datasets = {'train': modality.train, 'val': modality.val}
    return recipe.check_data(args, main_pixels.facts_of(datasets) if args.new == 'pixels' else {}, None)


def main(args: argparse.Namespace) -> int:
    """Train and evaluate all tasks. Returns the exit code."""
    device = init_distributed(args.device, args.dist_url, args.dist_timeout)
    check_same_on_all_ranks(recipe.flags_alike(args))
    on_main(check_new, args.output_dir, args.resume == 'auto')
    args, files, tokenizer = make_tokens(args, device)
    if args.tokenize_only:
        return 0
    if args.new == 'tokens':
        table = read_codebook(args.codebook_path)
        args = recipe.as_wide_as(table, recipe.files_by_default(args, table))
    recipe.set_up_torch(args)
    modality, tasks = (token_modality if args.new == 'tokens' else pixel_modality)(args, device)
    check_tasks(args, modality, tasks, device)  # run.json is written only once the last task is known to be possible
    print0(f'tokenizer: {tokenizer}')
    folder = RunFolder(args.output_dir)  # no other run writes there while this one lasts
    identity = identity_of(args, modality, tasks, tokenizer)
    check_same_on_all_ranks(identity)
    facts = facts_of_data(args, modality)
    on_main(lambda: check_same(folder.path / RUN, identity | facts, added=[*facts]))  # runs of before lack the facts

    lines = on_main(read_results, args.output_dir)
    with StopSignal() as stop:  # between trainings, which have their own
        for task in range(len(lines), len(tasks)):
            torch.manual_seed(args.seed)  # before each task, so that a resumed one builds its model from the same state
            began = time.monotonic()
            line = train_task(args, modality, tasks, task, device)
            if line is None:
                return REQUEUE
            lines = add_result(lines, line | {'tokenizer': tokenizer, **files.sizes(),
                                              'task_time': round(time.monotonic() - began, 1)})
            on_main(write_results, args.output_dir, lines)
            line = lines[-1]
            print0(f'task {task + 1}: top-1 {line["test_acc1"]:.2f} on {line["classes"]} classes, average '
                   f'{line["average_acc1"]:.2f}, memory {line["memory_images"]:,} images in {line["memory_bytes"]:,} '
                   'bytes')
            # rank 0's answer for all: a signal may have reached only some of them
            if task + 1 < len(tasks) and on_main(lambda: stop.received):
                return REQUEUE
    return 0


if __name__ == '__main__':
    run(main, parse_args)
