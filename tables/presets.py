"""What each preset says: images, models, epochs, learning rates, storage budgets. And what the paper says."""
from dataclasses import dataclass, field, replace

from utils import InputError

Words = tuple[str, ...]
# What is trained with a learning rate of its own: SeiT on tokens; a ViT on pixels; SeiT++'s network, which reads
# numbers of codes, from scratch; and the same from pre-training.
KINDS = ('tokens', 'pixels', 'codes', 'fine-tuning')


@dataclass(frozen=True)
class Tokenizer:
    """How a token set is made.

    Attributes:
        image_size: pixels on a side that images are resized to.
        input_size: main_seit.py's --input-size, 8 to a code: the whole grid, or a crop of it.
        make: the command that makes the tokenizer of --data-path in --output-dir, without these two flags; () for one
            that the user has.
        file: its name there; of one that the user has, its path from DATA/weights.
        codebook: of one that the user has, its codebook's path from DATA/tokens.
    """
    image_size: int
    input_size: int
    make: Words
    file: str
    codebook: str = 'codebook.ckpt'


@dataclass(frozen=True)
class Masked:
    """How SeiT++ is run: masked-token pre-training and fine-tuning.

    Attributes:
        token_adapt: the command that makes TokenAdapt of --data-path for a tokenizer, without these and --output-dir;
            () for weights/tokenadapt.ckpt that the user has in DATA; None to do without TokenAdapt.
        pretrain: flags of pre-training, but for epochs.
        pretrain_lrs: its learning rates. The first is taken; table 5 has a line for each other one, with one seed.
        finetune: flags of fine-tuning, and of training the same network from scratch.
        batch: flags of the batch, of all of them.
        warmup_epochs: of fine-tuning.
        tuning_part: fine-tuning takes SeiT's epochs divided by it.
    """
    token_adapt: Words | None
    pretrain: Words
    pretrain_lrs: tuple[float, ...]
    finetune: Words
    batch: Words
    warmup_epochs: int
    tuning_part: int = 3


@dataclass(frozen=True)
class Preset:
    """The sizes of a reproduction.

    Attributes:
        classes: the first ones in alphabetical order; None for all.
        images_per_class: the first of each class are for training; None for all.
        epochs, warmup_epochs: of a run on all images.
        same_steps: fewer images are seen in as many more epochs.
        launcher: words before a program that trains, or tokenizes.
        training: flags of all training.
        token_model, pixel_model: --model, and words that go with it.
        small_model, small_pixel_model: the same for a model that costs next to nothing.
        tokens, pixels: flags of training on each.
        lrs: learning rate by kind, of KINDS.
        search: learning rates by kind that were tried to find it, or that are to be tried: lines of their own.
        masked: of SeiT++.
        tokenizers: by name. The first is that of the tables, the others are further lines of table 1.
        published: token files in DATA/tokens by split, for all images at the first tokenizer: how their names begin,
            with a star for shards; {} where tokens are made.
        shares: of the images, for uniform sampling.
        token_shares: of the images, as tokens.
        sides: parts of the side that images are resized to.
        qualities: of JPEG.
        workers: processes of a program that decode images.
        quality_size: pixels on a side, at which reconstructions of all tokenizers are compared with the originals.
        more_sets: validation sets in DATA with classes of their own, by the name that --classes has for them.
        skip_classes: so many of the first classes are not taken.
        images: the folder in DATA that holds train/ and val/; '' for DATA.
        evaluated: whether there are validation images.
        evaluations: of a training, at equal distances; 0 for one after each epoch. A longer one has as many as epochs.
        rivals: the best of JPEG, WebP and AVIF within so many bytes an image: method, short side, quality, as
            `scripts/shrink_images.py --side` finds them.
        groups: names of groups of classes, all classes together, with the names of their classes: table 1 has their
            top-1 too.
        long_epochs: of lines of table 1 that are trained longer too; 0 for none.
        long_lines: these lines. Table 5 takes `long_epochs`, too.
        corruptions, severities: of table 3.
        corrupted_images: table 3 takes the first of each class; None for all.
        search_epochs: of the search for learning rates; None for `epochs`.
    """
    classes: int | None
    images_per_class: int | None
    epochs: int
    warmup_epochs: int
    same_steps: bool
    launcher: Words
    training: Words
    token_model: Words
    pixel_model: Words
    small_model: Words
    small_pixel_model: Words
    tokens: Words
    pixels: Words
    lrs: dict[str, float]
    search: dict[str, tuple[float, ...]]
    masked: Masked
    tokenizers: dict[str, Tokenizer]
    published: dict[str, str]
    shares: tuple[float, ...]
    token_shares: tuple[float, ...]
    sides: tuple[float, ...]
    qualities: tuple[int, ...]
    workers: int
    quality_size: int
    more_sets: Words = ()
    skip_classes: int = 0
    images: str = ''
    evaluated: bool = True
    evaluations: int = 0
    rivals: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    groups: dict[str, Words] = field(default_factory=dict)
    long_epochs: int = 0
    long_lines: Words = ()
    corruptions: Words = ('gaussian_noise', 'gaussian_blur', 'defocus_blur', 'jpeg_compression', 'contrast',
                          'brightness')
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    corrupted_images: int | None = None
    search_epochs: int | None = None

    def with_sizes(self, classes: int | None, images_per_class: int | None, epochs: int | None) -> 'Preset':
        """The preset with other classes, images or epochs; None for its own. Raises InputError."""
        preset = self
        if epochs:
            # all lines have them: none is longer, and the search is not shorter
            preset = replace(preset, epochs=epochs, warmup_epochs=min(self.warmup_epochs, epochs), long_epochs=0,
                             search_epochs=None)
        if not classes and not images_per_class:
            return preset
        if not classes and self.classes is None:
            raise InputError('--images-per-class: this preset takes all classes; give --classes too')
        # published tokens are of all classes, and a small folder lacks the images that a tokenizer's training holds out
        tokenizers = {name: replace(tokenizer, make=without(tokenizer.make, '--val-images'))
                      for name, tokenizer in self.tokenizers.items()}
        adapt = self.masked.token_adapt
        masked = replace(self.masked, token_adapt=adapt and without(adapt, '--val-images'))
        return replace(preset, classes=classes or self.classes, images_per_class=images_per_class or
                       self.images_per_class, published={}, tokenizers=tokenizers, masked=masked, groups={})


def without(words: Words, flag: str) -> Words:
    """A command without a flag and its value."""
    at = words.index(flag) if flag in words else len(words)
    return words[:at] + words[at + 2:]


FIT = ('scripts/fit_patch_tokenizer.py',)
VQ_TINY = ('scripts/train_tokenizer.py', '--image-size', '64', '--width', '128', '--depth', '2', '--lr', '5e-4',
           '--unscale-lr', '--min-lr', '1e-6', '--warmup-epochs', '0', '--val-images', '500', '--model-ema-decay',
           '0.99', '--resume', 'auto')
# As in docs/tokenizers.md.
TINY_TOKENIZERS = {
    'vitvqgan-16x16': Tokenizer(64, 128, (*VQ_TINY, '--patch-size', '4', '--batch-size', '16', '--epochs', '12',
                                          '--epoch-images', '3200'), 'tokenizer.safetensors'),
    'vitvqgan-8x8': Tokenizer(64, 64, (*VQ_TINY, '--patch-size', '8', '--batch-size', '64', '--epochs', '9',
                                      '--epoch-images', '6400'), 'tokenizer.safetensors'),
    'patch-16x16': Tokenizer(128, 128, (*FIT, '--image-size', '128'), 'tokenizer.pt'),
    'patch-8x8': Tokenizer(64, 64, (*FIT, '--image-size', '64'), 'tokenizer.pt'),
}
TINY_KWARGS = ('depth=4', 'embed_dim=128', 'num_heads=4')
SMALL_VIT = ('depth=12', 'embed_dim=384', 'num_heads=6')
SMALL_KWARGS = ('depth=1', 'embed_dim=32', 'num_heads=2')
PIXELS_OF_64 = ('img_size=64', 'patch_size=8', 'global_pool=avg')

TINY_MASKED = Masked(
    token_adapt=('scripts/fit_token_adapt.py', '--width', '128', '--batch-size', '32', '--lr', '2e-3', '--unscale-lr',
                 '--val-images', '500', '--epochs', '4', '--epoch-images', '9600', '--resume', 'auto'),
    pretrain=('--model-kwargs', *TINY_KWARGS, 'decoder_embed_dim=64', 'decoder_depth=1', 'decoder_num_heads=4',
              '--rrc-ratio', '0.35'),
    pretrain_lrs=(3e-3, 1e-3, 3e-4),  # first the best after fine-tuning; the least loss of pre-training misleads
    finetune=('--model-kwargs', *TINY_KWARGS, '--drop-path', '0', '--rrc-ratio', '0.35', '--mixup-prob', '0.2',
              '--token-noise-prob', '0'),
    batch=('--batch-size', '100'), warmup_epochs=1)

TINY = Preset(
    classes=20, images_per_class=500, epochs=6, warmup_epochs=1, same_steps=True, launcher=(),
    training=('--batch-size', '100', '--unscale-lr', '--warmup-lr', '1e-4', '--drop-path', '0', '--rrc-ratio', '0.35',
              '--mixup-prob', '0.2', '--model-ema-decay', '0.99'),
    token_model=('deit_tiny_token_32', '--model-kwargs', *TINY_KWARGS),
    pixel_model=('deit_tiny_patch16_224', '--model-kwargs', *PIXELS_OF_64, *TINY_KWARGS),
    small_model=('deit_tiny_token_32', '--model-kwargs', *SMALL_KWARGS),
    small_pixel_model=('deit_tiny_patch16_224', '--model-kwargs', *PIXELS_OF_64, *SMALL_KWARGS),
    tokens=('--token-noise-prob', '0'),  # the published noise is for 300 epochs: in ten it costs 4 points
    pixels=('--input-size', '64', '--aug', 'tokens', '--eval-crop-ratio', '1'),
    lrs={'tokens': 5e-4, 'pixels': 5e-4, 'codes': 1e-3, 'fine-tuning': 2e-3},  # the best of the search
    search=dict.fromkeys(KINDS, (2.5e-4, 5e-4, 1e-3, 2e-3)) | {'fine-tuning': (5e-4, 1e-3, 2e-3, 4e-3)},
    masked=TINY_MASKED,
    tokenizers=TINY_TOKENIZERS, published={}, shares=(0.6, 0.4, 0.2, 0.1), token_shares=(0.6, 0.2),
    sides=(0.75, 0.5, 0.25), qualities=(50, 20, 8), workers=1, quality_size=64)

# All 100 classes, and ViT-S. The tokenizers see all images 30 times.
VQ_GPU = ('scripts/train_tokenizer.py', '--image-size', '64', '--vit', 'small', '--epochs', '30', '--val-images',
          '1000', '--amp', 'bf16', '--resume', 'auto')
GPU_MASKED = replace(
    TINY_MASKED,
    token_adapt=('scripts/fit_token_adapt.py', '--batch-size', '256', '--epochs', '30', '--amp', 'bf16', '--resume',
                 'auto'),
    pretrain=('--model-kwargs', *SMALL_VIT, 'decoder_embed_dim=256', 'decoder_depth=2', 'decoder_num_heads=8',
              '--rrc-ratio', '0.35', '--amp', 'bf16'),
    finetune=('--model-kwargs', *SMALL_VIT, '--rrc-ratio', '0.35', '--mixup-prob', '0.5', '--token-noise-prob', '0',
              '--amp', 'bf16'),
    pretrain_lrs=(1e-3,), batch=('--batch-size', '512'), warmup_epochs=5)

TINY_GPU = replace(
    TINY, classes=None, images_per_class=None, epochs=100, warmup_epochs=5,
    training=('--batch-size', '512', '--unscale-lr', '--warmup-lr', '1e-5', '--drop-path', '0.1', '--rrc-ratio',
              '0.35', '--mixup-prob', '0.5', '--model-ema-decay', '0.9996', '--amp', 'bf16'),
    token_model=('deit_small_token_32',),
    pixel_model=('deit_small_patch16_224', '--model-kwargs', *PIXELS_OF_64),
    lrs=dict.fromkeys(KINDS, 1e-3), search=dict.fromkeys(KINDS, (5e-4, 1e-3, 2e-3)),  # not tried
    masked=GPU_MASKED,
    tokenizers=TINY_TOKENIZERS | {
        'vitvqgan-16x16': Tokenizer(64, 128, (*VQ_GPU, '--patch-size', '4', '--batch-size', '64'),
                                    'tokenizer.safetensors'),
        'vitvqgan-8x8': Tokenizer(64, 64, (*VQ_GPU, '--patch-size', '8', '--batch-size', '256'),
                                  'tokenizer.safetensors')},
    workers=8)

# Photographs of 224 pixels: ten easy classes and ten hard ones, 500 images each.
IMAGENETTE = ('n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079', 'n03394916', 'n03417042', 'n03425413',
              'n03445777', 'n03888257')
IMAGEWOOF = ('n02086240', 'n02087394', 'n02088364', 'n02089973', 'n02093754', 'n02096294', 'n02099601', 'n02105641',
             'n02111889', 'n02115641')
FIT_224 = (*FIT, '--image-size', '224')
# Both are given one CPU hour: steps of convolutions take half of the time of attention's.
VQ_224 = ('scripts/train_tokenizer.py', '--image-size', '224', '--width', '128', '--depth', '2', '--lr', '5e-4',
          '--unscale-lr', '--min-lr', '1e-6', '--warmup-epochs', '0', '--val-images', '500', '--model-ema-decay',
          '0.99', '--resume', 'auto', '--patch-size', '8', '--batch-size', '8', '--epoch-images', '2000', '--amp',
          'bf16')
# The first word of a path of the user's, below DATA.
DATA = 'DATA/'
PHOTO_TOKENIZERS = {
    'patch-28x28': Tokenizer(224, 224, FIT_224, 'tokenizer.pt'),
    'patch-28x28-64': Tokenizer(224, 224, (*FIT_224, '--codes', '64'), 'tokenizer.pt'),
    'patch-28x28-2048': Tokenizer(224, 224, (*FIT_224, '--codes', '2048', '--iterations', '20'), 'tokenizer.pt'),
    'patch-28x28-16384': Tokenizer(224, 224, (*FIT_224, '--codes', '16384', '--iterations', '5'), 'tokenizer.pt'),
    'patch-32x32': Tokenizer(256, 224, (*FIT, '--image-size', '256'), 'tokenizer.pt'),
    'latents-28x28': Tokenizer(
        224, 224, ('scripts/fit_latent_tokenizer.py', '--encoder', f'{DATA}weights/taef2_encoder.pth', '--decoder',
                   f'{DATA}weights/taef2_decoder.pth', '--image-size', '224'), 'tokenizer.pt'),
    'vitvqgan-28x28': Tokenizer(224, 224, (*VQ_224, '--epochs', '28'), 'tokenizer.safetensors'),
    'convvqgan-28x28': Tokenizer(224, 224, (*VQ_224, '--mixer', 'convolution', '--epochs', '52'),
                                 'tokenizer.safetensors'),
}
# The best PSNR at 224 pixels within so many bytes an image, of JPEG, WebP and AVIF at sides of 224 to 32 pixels:
# searched on 100 validation images (tables/README.md).
RIVALS = {500: ('webp', 64, 19), 1000: ('webp', 112, 15), 2000: ('avif', 224, 27), 4000: ('avif', 224, 44)}
# The published schedule goes by epochs, and lags by one: six would end with a quarter of the rate, and the thirty of a
# sample with a fiftieth.
PHOTOS_FLOAT32 = replace(
    TINY, classes=None, images_per_class=None, evaluations=1,
    training=('--batch-size', '100', '--unscale-lr', '--sched-on-updates', '--warmup-lr', '1e-4', '--drop-path', '0',
              '--rrc-ratio', '0.35', '--mixup-prob', '0.2', '--no-model-ema'),
    pixel_model=('deit_tiny_patch16_224', '--model-kwargs', 'global_pool=avg', *TINY_KWARGS),
    small_pixel_model=('deit_tiny_patch16_224', '--model-kwargs', 'global_pool=avg', *SMALL_KWARGS),
    pixels=('--input-size', '224', '--aug', 'tokens', '--eval-crop-ratio', '1'),
    lrs={'tokens': 1e-3, 'pixels': 2e-3, 'codes': 1e-3, 'fine-tuning': 2e-3},
    search={'tokens': (5e-4, 1e-3, 2e-3), 'pixels': (5e-4, 1e-3, 2e-3, 4e-3)},  # on, while the largest is the best
    tokenizers=PHOTO_TOKENIZERS, shares=(0.2, 0.04), token_shares=(0.2,), sides=(0.286,), qualities=(10,),
    masked=replace(TINY_MASKED, token_adapt=None, pretrain_lrs=(3e-3,), tuning_part=4),
    quality_size=224, rivals=RIVALS, groups={'Imagenette': IMAGENETTE, 'Imagewoof': IMAGEWOOF}, long_epochs=24,
    long_lines=('full pixels', 'sample 20%', 'tokens', 'best codec at 500 bytes'),
    # ImageNet-C's fifteen without the seven that need outside data or are not here
    corruptions=('gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'brightness', 'contrast', 'pixelate',
                 'jpeg_compression'),
    severities=(1, 3, 5), corrupted_images=25, search_epochs=3)
BF16 = ('--amp', 'bf16')
PHOTOS = replace(
    PHOTOS_FLOAT32, training=(*PHOTOS_FLOAT32.training, *BF16),
    masked=replace(PHOTOS_FLOAT32.masked, pretrain=(*TINY_MASKED.pretrain, *BF16),
                   finetune=(*TINY_MASKED.finetune, *BF16)))
PHOTOS_GPU = replace(
    PHOTOS, epochs=100, warmup_epochs=5, token_model=('deit_small_token_32',),
    # batches that divide the samples of a twenty-fifth and a fifth
    training=('--batch-size', '400', *TINY_GPU.training[2:], '--sched-on-updates'),
    pixel_model=('deit_small_patch16_224', '--model-kwargs', 'global_pool=avg'), lrs=TINY_GPU.lrs,
    search=TINY_GPU.search, masked=GPU_MASKED, long_epochs=0, search_epochs=None, workers=8)

# The published command; pixels as DeiT trains them. What is not published about a baseline is our choice, and says so
# in tables/README.md.
IMAGENET_MASKED = Masked(
    token_adapt=(), pretrain=('--accum-iter', '4'), pretrain_lrs=(2.4e-3,),
    finetune=('--dist-eval',),
    batch=('--batch-size', '128'), warmup_epochs=5)

IMAGENET = Preset(
    classes=None, images_per_class=None, epochs=300, warmup_epochs=5, same_steps=False,
    launcher=('torchrun', '--nproc_per_node=8'),
    training=('--batch-size', '128', '--dist-eval'),
    token_model=('deit_base_token_32',), pixel_model=('deit_base_patch16_224',),
    small_model=('deit_tiny_token_32', '--model-kwargs', *SMALL_KWARGS),
    small_pixel_model=('deit_tiny_patch16_224', '--model-kwargs', *SMALL_KWARGS),
    tokens=(), pixels=('--input-size', '224', '--aug', 'deit', '--weight-decay', '0.05'),
    lrs={'tokens': 7.5e-4, 'pixels': 5e-4, 'codes': 1.5e-3, 'fine-tuning': 4e-3}, search={}, masked=IMAGENET_MASKED,
    tokenizers={'vitvqgan-32x32': Tokenizer(256, 224, (), 'tokenizer.safetensors'),
                'vitvqgan-16x16': Tokenizer(128, 112, (), 'tokenizer.safetensors')},
    published={'train': 'imagenet1k-train', 'val': 'imagenet1k-val'}, shares=(0.6, 0.4, 0.2, 0.1),
    token_shares=(0.6, 0.2), sides=(0.5, 0.2), qualities=(50, 5), workers=10, quality_size=256,
    more_sets=('imagenet-r', 'imagenet-a', 'imagenet-sketch'))

PRESETS = {'imagenet': IMAGENET, 'tiny': TINY, 'tiny-gpu': TINY_GPU, 'photos': PHOTOS,
           'photos-float32': PHOTOS_FLOAT32, 'photos-gpu': PHOTOS_GPU}


# ---------------------------------------------------------------- the table of pre-training

# What each line is pre-trained on, '' for nothing, and trained on.
PRETRAINING_LINES = {
    'tokens to tokens': ('tokens', 'tokens'),
    'tokens to pixels': ('tokens', 'pixels'),
    'pixels to pixels': ('pixels', 'pixels'),
    'tokens from scratch': ('', 'tokens'),
    'pixels from scratch': ('', 'pixels'),
}


@dataclass(frozen=True)
class Pretraining:
    """The sizes of the table of pre-training.

    Attributes:
        before: of pre-training.
        after: of fine-tuning, and of training from scratch for as many epochs.
        lrs, search: of `after` as in Preset, but by line.
    """
    before: Preset
    after: Preset
    lrs: dict[str, float]
    search: dict[str, tuple[float, ...]]

    def with_sizes(self, classes: int | None, images_per_class: int | None, epochs: int | None) -> 'Pretraining':
        """As Preset's; the first half of the classes is for pre-training. Raises InputError."""
        if classes == 1:
            raise InputError('--classes 1: pre-training and fine-tuning have classes of their own; give 2 or more')
        first = classes // 2 if classes else None
        after = self.after.with_sizes(classes - first if classes else None, images_per_class, epochs)
        return replace(self, before=self.before.with_sizes(first, images_per_class, epochs),
                       after=replace(after, skip_classes=first) if classes else after)


# The head of a model that starts from tokens reads the mean of the patches, so those of pixels do.
AVERAGED = ('deit_base_patch16_224', '--model-kwargs', 'global_pool=avg')
PRETRAINING = {
    # Half of the classes to the other half. 5e-4 is what the search of table 1 found for tokens and for pixels.
    'tiny': Pretraining(
        replace(TINY, classes=50, images_per_class=200, lrs={'tokens': 5e-4, 'pixels': 5e-4}),
        replace(TINY, classes=50, skip_classes=50, images_per_class=100),
        {'tokens to tokens': 5e-4, 'tokens to pixels': 5e-4, 'pixels to pixels': 1e-3, 'tokens from scratch': 2e-3,
         'pixels from scratch': 1e-3},
        dict.fromkeys(PRETRAINING_LINES, TINY.search['tokens'])),
    'tiny-gpu': Pretraining(
        replace(TINY_GPU, classes=50), replace(TINY_GPU, classes=50, skip_classes=50, epochs=50),
        dict.fromkeys(PRETRAINING_LINES, 1e-3), dict.fromkeys(PRETRAINING_LINES, TINY_GPU.search['tokens'])),
    # ImageNet-21k has no validation images. The epochs are our choice: the paper's are not known to us.
    'imagenet': Pretraining(
        replace(IMAGENET, images='imagenet21k', published={'train': 'imagenet21k-train-*'}, evaluated=False, epochs=90,
                pixel_model=AVERAGED),
        replace(IMAGENET, epochs=100, pixel_model=AVERAGED),
        {line: IMAGENET.lrs[now] for line, (_, now) in PRETRAINING_LINES.items()}, {}),
}


# ---------------------------------------------------------------- the table of continual learning

@dataclass(frozen=True)
class Protocol:
    """A class-incremental protocol, and what is compared under it.

    Attributes:
        preset: images, models and flags of training; its epochs are those of a task.
        base: classes of the first task.
        increment: classes of each later task.
        lrs: learning rates on tokens and on pixels.
        image_size: pixels on a side that images are resized to, to be tokenized.
        input_size: main_seit.py's, 8 pixels to a code.
        qualities: of JPEGs in memory.
        sides: of small pixels in memory.
        memories: in bytes.
    """
    preset: Preset
    base: int
    increment: int
    lrs: dict[str, float]
    image_size: int
    input_size: int
    qualities: tuple[int, ...]
    sides: tuple[int, ...]
    memories: tuple[int, ...] = (250_000, 1_000_000, 4_000_000)

    def with_sizes(self, classes: int | None, images_per_class: int | None, epochs: int | None) -> 'Protocol':
        """As Preset's; tasks have as large a part of the classes as before, but one at least. Raises InputError."""
        share = classes / (self.preset.classes or 100) if classes else 1
        return replace(self, preset=self.preset.with_sizes(classes, images_per_class, epochs),
                       base=max(1, round(share * self.base)), increment=max(1, round(share * self.increment)))


# The learning rates of `tiny` are those that the search of table 1 found for its images and models.
TINY_TASKS = Protocol(TINY, 4, 4, {'tokens': 5e-4, 'pixels': 5e-4}, 128, 128, qualities=(50, 8), sides=(32, 16))
B10_INC10 = Protocol(
    replace(IMAGENET, epochs=170, launcher=(), training=('--batch-size', '128'),
            token_model=('deit_small_token_32',), pixel_model=('deit_small_patch16_224',),
            pixels=(*IMAGENET.pixels, '--no-repeated-aug')),
    10, 10, {'tokens': 7.5e-4, 'pixels': 5e-4}, 256, 224, qualities=(50, 10), sides=(112, 56))
PROTOCOLS = {'tiny': TINY_TASKS, 'b10-inc10': B10_INC10, 'b50-inc5': replace(B10_INC10, base=50, increment=5)}


# ---------------------------------------------------------------- the paper

# ImageNet-1k top-1 of ViT-B, and the storage, as far as the project's sources have them (arXiv 2303.11114, 2312.10105,
# read from secondary sources). Table 1: by line.
PAPER = {
    'full pixels': (81.8, '140 GB'),
    'resize x0.2': (75.2, '9.6 GB'),
    'JPEG q5': (74.6, '11 GB'),
    'tokens': (74.0, '1.4 GB'),
    'tokens 60%': (66.3, '0.8 GB'),
    'tokens 20%': (47.2, '0.3 GB'),
}
PAPER_SEITPP = 77.8  # on the same 1.4 GB
# Table 3, SeiT: what severity the corruptions had is not known to us, nor which blur it was.
PAPER_ROBUSTNESS = {'clean': 74.0, 'imagenet-r': 25.5, 'imagenet-sketch': 22.6}
PAPER_CORRUPTIONS = {'gaussian_noise': '50.7', 'gaussian_blur': '62.6 ("blur")'}
