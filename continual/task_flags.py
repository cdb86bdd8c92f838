"""The flags of class-incremental training: tasks, replay memory, tokens."""
from typing import Any

import flags
from continual.forms import FORMS
from continual.memory import POLICIES
from continual.tasks import ORDER_SEED
from flags import SYNONYMS, Parser, add_exif_rotate, add_max_pixels, byte_count, integer
from utils import InputError

LABELS = '; scripts/convert_tokens.py writes the labels that are inside a set of another project to a file'
# Flags of main_seit.py and main_pixels.py that are refused here, and why: they would be ignored in silence.
NOT_HERE = {
    'eval': 'each task is evaluated when it ends',
    'no_eval': 'each task is evaluated when it ends',
    'eval_freq': 'each task is evaluated when it ends',
    'output': 'results.jsonl has the numbers of each task',
    'report': 'results.jsonl has the numbers of each task',
    'corruption': 'each task is evaluated on images as they are',
    'severity': 'each task is evaluated on images as they are',
    'classes': 'each task is evaluated on all classes seen',
    'start_epoch': 'tasks begin where they were left',
    'views': 'a memory keeps one grid of an image: convert the set by scripts/convert_tokens.py',
    'val_share': 'a validation set is given',
    'nb_classes': 'the tasks must divide the classes of the labels',
    'repeated_aug': 'steps draw from two sources, each without repeats; beside --aug deit give --no-repeated-aug',
}


def add_task_flags(parser: Parser) -> None:
    """The flags of tasks, memory and tokens."""
    add = parser.add_group('tasks')
    add('--new', default='tokens', choices=['tokens', 'pixels'],
        help='whether new images are trained on as tokens or as pixels')
    add('--base-classes', type=integer(1), default=10, help='how many classes the first task has')
    add('--inc-classes', type=integer(1), default=10, help='how many classes each later task adds')
    add('--order-seed', type=integer(0, (1 << 32) - 1), default=ORDER_SEED,
        help='seed of the order in which classes come')
    add('--joint', action='store_true',
        help='train each task on all images of all classes seen, without a memory: the upper bound')
    add('--model-ema', action=flags.ON_OFF, default=False,
        help="keep a moving average (EMA) of a task's weights, and evaluate it too; the next task starts from the "
             'weights themselves')

    add = parser.add_group('memory')
    add('--memory', default='none', choices=['none', *FORMS],
        help='how old images are stored')
    add('--memory-bytes', type=byte_count, metavar='BYTES',
        help='bytes of the memory, as in 1e6; labels and index count too')
    add('--memory-policy', default='balanced', choices=POLICIES,
        help='which images are kept: equally many of each class, or a uniform sample of all that came by')
    add('--memory-quality', type=integer(1, 95), help='JPEG quality of --memory jpeg')
    add('--memory-side', type=integer(1),
        help='with --memory resize, the largest short side of a stored image in pixels')
    add('--replay-share', type=flags.FRACTION, default=0.5,
        help='fraction of each batch that comes from memory')
    add('--eval-stored', action='store_true',
        help='also evaluate the validation images as the memory would give them back; with --new pixels this shows '
        'what the difference between stored and new images costs')

    add = parser.add_group('data')
    add('--train-path', default='', metavar='PATH', of_a_rank=True,
        help='training images: class folders, a list, tar shards or parquet files')
    add('--val-path', default='', metavar='PATH', of_a_rank=True, help='validation images of the same classes')
    for split in ('train', 'val'):
        add(f'--{split}-token-file', default='', metavar='FILE', of_a_rank=True,
            help='token files that exist already, as for main_seit.py')
        add(f'--{split}-label-file', default='', metavar='FILE', of_a_rank=True, help='labels of these token files')
    add('--codebook-path', default='', metavar='FILE', of_a_rank=True,
        help='the codebook of the token files or of the tokenizer')
    add('--tokenizer-path', default='', metavar='FILE', of_a_rank=True,
        help='tokenizer that makes tokens of the images, or images of the tokens in memory')
    add('--tokenizer-from-task', type=int, choices=[0],
        help="fit a patch tokenizer to the first task's images, and tokenize with it")
    add('--image-size', type=integer(1), default=256,
        help='pixels to which both sides of an image are resized before it is tokenized')
    add_max_pixels(add)
    add_exif_rotate(add, exact=True)
    add('--tokens-dir', default='', metavar='DIR', of_a_rank=True,
        help='folder for the tokens that are made here (default: tokens in --output-dir); runs with the same first '
        'task may use one folder')
    add('--tokenize-only', action='store_true', help='make the tokens and stop')


def check_task_flags(flags: dict[str, Any]) -> None:
    """InputError for values of the flags above, by name, that cannot work together."""
    # tokens are used in training or in memory; they are given as files, or made by a tokenizer
    new, memory, given = flags['new'], flags['memory'], bool(flags['train_token_file'])
    tokens = 'tokens' in (new, memory)
    made = [name for name in ('tokenizer_path', 'tokenizer_from_task') if flags[name] not in ('', None)]
    checks = [
        (new == 'tokens' and memory not in ('none', 'tokens'),
         f'--new tokens with --memory {memory}: what is trained on tokens is kept as tokens; choose --memory '
         'tokens, or --new pixels'),
        (flags['joint'] and memory != 'none', '--joint keeps all images: it takes --memory none'),
        ((memory != 'none') != (flags['memory_bytes'] is not None),
         '--memory and --memory-bytes belong together: give both, or neither'),
        ((memory == 'jpeg') != (flags['memory_quality'] is not None), '--memory jpeg and --memory-quality belong '
         'together'),
        ((memory == 'resize') != (flags['memory_side'] is not None), '--memory resize and --memory-side belong '
         'together'),
        (flags['eval_stored'] and (new == 'tokens' or memory in ('none', 'pixels')),
         '--eval-stored is for --new pixels with --memory jpeg, resize or tokens: others store images as new ones are'),
        (not tokens and (given or made), 'a tokenizer or tokens are given, but --new and --memory have no tokens'),
        (given and (not flags['train_label_file'] or not flags['codebook_path']),
         f'--train-token-file needs --train-label-file and --codebook-path{LABELS}'),
        (given and (new == 'tokens' or flags['eval_stored']) and not (flags['val_token_file'] and
                                                                      flags['val_label_file']),
         f'--train-token-file needs --val-token-file and --val-label-file{LABELS}'),
        (not given and flags['tokenizer_from_task'] is not None and flags['codebook_path'],
         '--tokenizer-from-task makes a codebook of its own: it takes no --codebook-path'),
        (given and flags['tokenizer_from_task'] is not None,
         '--tokenizer-from-task makes tokens, but --train-token-file gives them: choose one'),
        (given and new == 'pixels' and not flags['tokenizer_path'],
         '--memory tokens with --new pixels needs the --tokenizer-path that decodes them'),
        (tokens and not given and len(made) != 1, 'tokens come from --train-token-file, from --tokenizer-path or from '
         '--tokenizer-from-task 0: give one of the three'),
        ((new == 'pixels' or not given) and not (flags['train_path'] and flags['val_path']),
         '--train-path and --val-path: name the images; class folders, a list, tar shards or parquet files'),
        (flags['tokenize_only'] and (given or not made),
         '--tokenize-only needs --tokenizer-path or --tokenizer-from-task 0'),
    ]
    for wrong, message in checks:
        if wrong:
            raise InputError(message)


def check_not_here(flags: dict[str, Any]) -> None:
    """InputError for flags of main_seit.py or main_pixels.py, by name, that a run of tasks does not take."""
    for name, why in NOT_HERE.items():
        if flags.get(name):
            raise InputError(f'--{name.replace("_", "-")} is no flag of main_continual.py: {why}')


def check_program_flags(flags: dict[str, Any]) -> None:
    """InputError for flags of main_seit.py or main_pixels.py, by name, with which a run of tasks cannot be."""
    check_not_here(flags)
    if flags['recipe'] != 'published':
        raise InputError(f'--recipe {flags["recipe"]} is not for main_continual.py: give --epochs, --lr and the '
                         'others; tasks are smaller than the set that a recipe would be chosen by')
    if (flags['new'] == 'tokens' and not flags['train_token_file'] and
            flags['token_synonym_dict'] != SYNONYMS):
        raise InputError('--token-synonym-dict: synonyms are made with the tokens; give it beside --train-token-file')
    if not flags['output_dir']:
        raise InputError('--output-dir: give one; tasks pass weights and memory on in files')
    if flags['resume'] not in ('', 'auto'):
        raise InputError(f'--resume {flags["resume"]}: a run of tasks resumes by --resume auto')
    if flags['memory'] != 'none' and not 0 < round(flags['replay_share'] * flags['batch_size']) < flags['batch_size']:
        raise InputError(f'--replay-share {flags["replay_share"]:g} of --batch-size {flags["batch_size"]}: leaves no '
                         'image for the memory, or none for the task')
