"""scripts/probe.py: neighbors and linear probes as scikit-learn has them, and checkpoints of each program."""
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import main_mtm_pretrain
import main_pixels
import tokenize_images
from foreign_sets import write_folder
from helpers import SMALL, call, fails, make_data, run_here, smooth_images, states
from scripts import fit_patch_tokenizer, probe
from masked import DECODER, SIZES
from scripts.probe import accuracies, fit_linear, linear_probe, neighbor_votes, scores_of, standardize
from seitpp.models_mtm import create_model as create_masked
from seitpp.models_mtm_finetune import create_model as create_classifier
from token_augment import EvalTransform
from token_dataset import TokenDataset
from token_files.codebook import load_codebook

pytestmark = pytest.mark.usefixtures('one_thread')
PIXELS = ['--device', 'cpu', '--model', 'deit_tiny_patch16_224', '--model-kwargs', 'depth=1', 'embed_dim=32',
          'num_heads=2', 'global_pool=avg', 'img_size=32', '--input-size', 32, '--batch-size', 6, '--num-workers', 0,
          '--eval-crop-ratio', 1]
FILES = ('--codebook-path', '--train-token-file', '--train-label-file', '--val-token-file', '--val-label-file')


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    """Flags of a set of 40 training images, and a checkpoint of main_seit.py."""
    folder = tmp_path_factory.mktemp('tokens')
    words = make_data(folder, n=40)
    run_here(*SMALL, *words, '--epochs', 1, '--no-eval', '--output-dir', folder / 'run')
    pairs = dict(zip(words[::2], words[1::2]))
    return [word for flag in FILES for word in (flag, pairs[flag])], folder / 'run' / 'checkpoint.pth'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Flags of 24 images of three classes, and a checkpoint of main_pixels.py."""
    folder = tmp_path_factory.mktemp('images')
    smooth_images(folder / 'data')
    words = ['--train-path', folder / 'data', '--val-path', folder / 'data']
    call(main_pixels, *PIXELS, *words, '--epochs', 1, '--output-dir', folder / 'run')
    return words, folder / 'run' / 'checkpoint.pth'


def probed(words, checkpoint, *flags):
    return call(probe, '--device', 'cpu', '--num-workers', 0, '--checkpoint', checkpoint, *words, *flags)


def test_tokens_as_scikit_learn_judges_them(tokens, tmp_path, capsys):
    """Features are what the head reads, in eval mode; the lines and the file say the same."""
    words, checkpoint = tokens
    probed(words, checkpoint, '--neighbors', 5, '--output', tmp_path / 'p.json')
    output = capsys.readouterr().out
    results = json.loads((tmp_path / 'p.json').read_text())
    assert results == results | {'train': 40, 'val': 11, 'classes': 4, 'dim': 32}
    for name, key in (('kNN', 'knn'), ('linear', 'linear')):
        found, = re.findall(rf'^\* {name} Acc@1 (\S+) Acc@5 (\S+) \(', output, re.MULTILINE)
        assert found == (f'{results[key]["acc1"]:.3f}', f'{results[key]["acc5"]:.3f}')

    flags = dict(zip(words[::2], words[1::2]))
    model = timm.create_model('deit_tiny_token_32', depth=1, embed_dim=32, num_heads=2, img_size=8, num_classes=4)
    model.load_state_dict(states(checkpoint)['model'])
    read = []
    model.head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    codebook = load_codebook(flags['--codebook-path'])
    sets = {}
    for split in ('train', 'val'):
        data = TokenDataset(flags[f'--{split}-token-file'], flags[f'--{split}-label-file'], 30, 'none')
        codes, labels = data.batch(np.arange(len(data)))
        with torch.no_grad():
            model.eval()(EvalTransform(codebook, 8, torch.device('cpu'))(codes))
        sets[split] = read.pop().numpy(), labels.numpy()
    neighbors = KNeighborsClassifier(5, metric='cosine', weights=lambda distances: np.exp(-distances / 0.07))
    theirs = neighbors.fit(*sets['train']).score(*sets['val'])
    assert results['knn']['acc1'] == pytest.approx(100 * theirs)


def test_images_and_one_probe_alone(images, tmp_path, capsys):
    words, checkpoint = images
    probed(words, checkpoint, '--neighbors', 1, '--probes', 'knn', '--output', tmp_path / 'p.json')
    results = json.loads((tmp_path / 'p.json').read_text())
    assert results['knn']['acc1'] == 100 and 'linear' not in results  # each image is its own nearest neighbor
    assert results['dim'] == 32 and '* linear' not in capsys.readouterr().out


def test_averaged_weights_are_others(images, tmp_path):
    words, checkpoint = images
    averaged = states(checkpoint)
    averaged['model_ema'] = {key: value + 1 for key, value in averaged['model'].items()}
    averaged['model'] = {key: torch.full_like(value, torch.nan) for key, value in averaged['model'].items()}
    torch.save(averaged, tmp_path / 'averaged.pth')
    probed(words, tmp_path / 'averaged.pth', '--neighbors', 1, '--use-ema', '--output', tmp_path / 'p.json')
    assert json.loads((tmp_path / 'p.json').read_text())['knn']['acc1'] == 100


def test_a_convolutional_network(images, tmp_path, capsys):
    """Any model of timm, by its name; its weights know the classes."""
    words, _ = images
    torch.save({'model': timm.create_model('resnet10t', num_classes=7).state_dict()}, tmp_path / 'w.pth')
    probed(words, tmp_path / 'w.pth', '--model', 'resnet10t', '--input-size', 32, '--probes', 'knn', '--neighbors', 1)
    assert '* kNN Acc@1 100.000' in capsys.readouterr().out
    fails(lambda: probed(words, tmp_path / 'w.pth'), 'w.pth: does not say of which model it is: give --model')
    fails(lambda: probed(words, tmp_path / 'w.pth', '--model', 'resnet10t'), 'w.pth: does not say how it reads images')


def test_masked_token_pre_training_without_labels(tokens, tmp_path, capsys):
    """Its encoder, as the classifier that main_mtm_finetune.py makes of it."""
    words, _ = tokens
    args = main_mtm_pretrain.parse_args([*SIZES, *DECODER])
    masked = create_masked(args.model, args.model_kwargs, 30, 8)
    torch.save({'model': masked.state_dict(), 'args': {'model': args.model, 'model_kwargs': args.model_kwargs}},
               tmp_path / 'masked.pth')
    probed(words, tmp_path / 'masked.pth', '--neighbors', 40)
    output = capsys.readouterr().out
    assert 'features: 40 for training and 11 for validation, 32 numbers each, 4 classes' in output
    assert output.count('\n* ') == 2


def test_a_fine_tuned_classifier_without_its_head(tokens, tmp_path, capsys):
    words, _ = tokens
    kwargs = {'depth': 1, 'embed_dim': 32, 'num_heads': 2}
    model = create_classifier('deit_tiny_token_32', kwargs, codebook_size=30, img_size=8, num_classes=7)
    torch.save({'model': model.state_dict(), 'args': {'model': 'deit_tiny_token_32', 'model_kwargs': kwargs}},
               tmp_path / 'tuned.pth')
    probed(words, tmp_path / 'tuned.pth', '--probes', 'knn', '--output', tmp_path / 'p.json')
    assert 'model: main_mtm_finetune.py deit_tiny_token_32, 0.02 M parameters, 0 classes' in capsys.readouterr().out
    assert json.loads((tmp_path / 'p.json').read_text())['dim'] == 32


@pytest.mark.parametrize('number', [3, 9])
def test_few_training_images_are_refused_before_the_work_and_have_neighbors(number, images, tmp_path, monkeypatch):
    """The linear probe needs ten; nothing is computed that would be lost then."""
    words, checkpoint = images
    paths = sorted(words[1].rglob('*.png'))
    chosen = [path for i in range(3) for path in paths[8 * i:8 * i + number // 3]]
    (tmp_path / 'few.txt').write_text(''.join(f'{path}\t{i // (number // 3)}\n' for i, path in enumerate(chosen)))
    few = ['--train-path', tmp_path / 'few.txt', *words[2:], '--neighbors', 3, '--output', tmp_path / 'p.json']
    with monkeypatch.context() as patch:
        patch.setattr(probe, 'features_of', None)
        for probes in ([], ['--probes', 'linear']):
            fails(lambda: probed(few, checkpoint, *probes),
                  f'--probes linear: .*few.txt has {number}: give more, or --probes knn')
    assert not (tmp_path / 'p.json').exists()
    probed(few, checkpoint, '--probes', 'knn')
    assert json.loads((tmp_path / 'p.json').read_text()).keys() >= {'knn', 'train'}


def test_neighbors_are_printed_before_the_linear_probe(images, monkeypatch, capsys):
    words, checkpoint = images
    monkeypatch.setattr(probe, 'linear_probe', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probed(words, checkpoint)
    assert '* kNN Acc@1 ' in capsys.readouterr().out


def test_mistakes_are_one_line(tokens, images, tmp_path):
    words, checkpoint = tokens
    paths, pixels = images
    output = tmp_path / 'p.json'
    fails(lambda: probed(words, pixels, '--output', output), 'is of main_pixels.py, which reads images: give --train-p')
    fails(lambda: probed(paths, checkpoint), 'is of main_seit.py, which reads tokens: give --train-token-file')
    fails(lambda: probed(words[:-2], checkpoint), 'give --train-path, --val-path, or --train-token-file, ')
    fails(lambda: probed([*words, *paths], checkpoint), 'give --train-path, --val-path, or --train-token-file, ')
    fails(lambda: probed(words, checkpoint, '--neighbors', 41), '--neighbors 41: .*train-token.data.bin.gz has 40 imag')
    fails(lambda: probed(words, checkpoint, '--model', 'deit_small_token_32'), 'checkpoint.pth: does not fit the model')
    fails(lambda: probed(paths, pixels, '--model', 'resnet10t'), 'no fc.bias among its weights')
    fails(lambda: probed(words, checkpoint, '--output', checkpoint), 'is read, and would be replaced')
    smooth_images(tmp_path / 'val')
    (tmp_path / 'val' / 'cat').rename(tmp_path / 'val' / 'dog')
    fails(lambda: probed([*paths[:2], '--val-path', tmp_path / 'val'], pixels, '--output', output),
          "val: class 2 is 'dog', but in .* it is 'cat'")
    broken = torch.load(checkpoint)
    broken['model'] = {name: value * math.nan for name, value in broken['model'].items()}
    torch.save(broken, tmp_path / 'broken.pth')
    fails(lambda: probed(words, tmp_path / 'broken.pth', '--output', output), 'gives features that are not finite')
    assert not output.exists()


# ---------------------------------------------------------------- the numbers

def clouds(n, classes=5, dim=12, noise=3., seed=0):
    """Features (n, dim) float32 around a center for each class, and their labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    labels[:classes] = torch.arange(classes)
    return centers[labels] + noise * torch.randn(n, dim, generator=generator), labels


@pytest.mark.parametrize('k', [1, 7, 20])
@pytest.mark.parametrize('temperature', [0.07, 1.])
def test_neighbors_are_those_of_scikit_learn(k, temperature, monkeypatch):
    """Votes by class, also where similarities are made in several chunks."""
    train, labels = clouds(150)
    queries, _ = clouds(61, seed=1)

    def weights_of(distances):
        return np.exp((1 - distances) / temperature)

    theirs = KNeighborsClassifier(k, weights=weights_of, metric='cosine', algorithm='brute')
    theirs.fit(train.numpy(), labels.numpy())
    monkeypatch.setattr(probe, 'CHUNK_ELEMENTS', 17 * 150)
    votes = neighbor_votes(train, labels, queries, 5, k, temperature)
    shares = votes.softmax(1)
    np.testing.assert_allclose(shares, theirs.predict_proba(queries.numpy()), atol=1e-4)
    assert (votes.argmax(1).numpy() == theirs.predict(queries.numpy())).all()


def test_a_low_temperature_does_not_overflow():
    train, labels = clouds(40, noise=0.1)
    votes = neighbor_votes(train, labels, train, 5, 10, 1e-4)
    assert not votes.isnan().any() and (votes.argmax(1) == labels).all()


@pytest.mark.parametrize('temperature', [0.07, 1e-6])
def test_a_class_without_a_vote_is_no_prediction(temperature):
    """And one whose vote is too small for a number is one, in the order of the similarities."""
    train = torch.eye(8)
    labels = torch.arange(8)
    queries = torch.tensor([[4., 3, 2, 0, 0, 0, 0, 0]])
    for k, voted in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2])):
        votes = neighbor_votes(train, labels, queries, 8, k, temperature)
        assert votes.isfinite().nonzero()[:, 1].tolist() == voted
        assert votes.argsort(descending=True)[0, :k].tolist() == voted
        for label in range(8):
            found = accuracies(votes, torch.tensor([label]))
            assert found == {'acc1': 100. * (label == 0), 'acc5': 100. * (label in voted)}
    # several neighbors of few classes have together as many votes as classes
    votes = neighbor_votes(train, labels % 2, queries, 8, 6, temperature)
    assert accuracies(votes, torch.tensor([7]))['acc5'] == 0 and accuracies(votes, torch.tensor([1]))['acc5'] == 100


def test_more_neighbors_than_images_are_one_line():
    train, labels = clouds(10)
    fails(lambda: neighbor_votes(train, labels, train, 5, 11), '11 neighbors of 10 training images: ask for fewer')
    fails(lambda: linear_probe(train[:9], labels[:9], train, 5), '9 training images: a linear probe holds one in 10')


@pytest.mark.parametrize('decay', [1e-1, 1e-3])
def test_the_linear_probe_is_the_regression_of_scikit_learn(decay, monkeypatch):
    train, labels = clouds(300)
    queries, _ = clouds(50, seed=1)
    train, queries = standardize(train * torch.arange(1., 13), queries * torch.arange(1., 13))
    theirs = LogisticRegression(C=1 / (decay * len(train)), tol=1e-8, max_iter=1000).fit(train.numpy(), labels.numpy())
    monkeypatch.setattr(probe, 'CHUNK_ELEMENTS', 5 * 64)
    weights = fit_linear(train, labels, decay, torch.zeros(13, 5))
    probabilities = scores_of(weights, queries).softmax(1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(queries.numpy()), atol=2e-3)
    assert torch.equal(weights, fit_linear(train, labels, decay, torch.zeros(13, 5)))


def test_standardizing_uses_the_first_set_and_leaves_constants_finite():
    train, _ = clouds(100)
    train[:, 3] = 7
    ours, other = standardize(5 + 2 * train, train)
    torch.testing.assert_close(ours.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.std(0, correction=0)[4:], torch.ones(8))
    assert (ours[:, 3] == 0).all() and (other[:, 3] == 0).all()
    torch.testing.assert_close(other[:, 0], (train[:, 0] - (5 + 2 * train[:, 0]).mean()) / (2 * train[:, 0]).std(
        correction=0))


@pytest.mark.parametrize('value, noise', [(0.1, 0.), (1e4 / 3, 0.), (0.3, 3e-8), (0., 1e-7)])
def test_features_are_not_divided_by_rounding(value, noise):
    """The mean of equal numbers is rounded; and 0 may be a sum of numbers that are not."""
    train, _ = clouds(1001)
    train[:, 3] = value + noise * torch.randn(1001, generator=torch.Generator().manual_seed(0))
    ours, other = standardize(train, train + 1)
    assert (ours[:, 3] == 0).all() and (other[:, 3] == 0).all() and (ours[:, :3].std(0) > 0.9).all()
    train[:, 3] = value + 1e-3 * max(1, value) * train[:, 4]  # which is none
    ours, _ = standardize(train, train)
    torch.testing.assert_close(ours[:, 3], ours[:, 4], atol=1e-2, rtol=0)


def test_the_weight_decay_is_chosen_on_held_out_features():
    """Few images, many dimensions of noise: little decay overfits, and is not taken; a useless one is not."""
    train, labels = clouds(200, classes=2, dim=100, noise=6.)
    queries, wanted = clouds(400, classes=2, dim=100, noise=6., seed=1)
    decays = (1e3, 1., 1e-7)
    scores, best = linear_probe(train, labels, queries, 2, decays)
    assert best == 1 and torch.equal(scores, linear_probe(train, labels, queries, 2, decays)[0])
    alone = {decay: linear_probe(train, labels, queries, 2, (decay,))[0] for decay in decays}
    assert torch.equal(scores, alone[1.])
    assert accuracies(scores, wanted)['acc1'] > accuracies(alone[1e-7], wanted)['acc1']


def test_accuracies():
    scores = torch.tensor([[3., 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    assert accuracies(scores, torch.tensor([0, 5, 0])) == pytest.approx({'acc1': 200 / 3, 'acc5': 200 / 3})
    assert accuracies(scores, torch.tensor([4, 1, 5])) == pytest.approx({'acc1': 100 / 3, 'acc5': 100})
    assert accuracies(scores[:, :3], torch.tensor([2, 2, 0])) == pytest.approx({'acc1': 100 / 3, 'acc5': 100})


def test_sets_of_others_have_labels_inside(tokens, tmp_path, capsys):
    words, checkpoint = tokens
    flags = dict(zip(words[::2], words[1::2]))
    for split in 'train', 'val':
        data = TokenDataset(flags[f'--{split}-token-file'], flags[f'--{split}-label-file'], 30, 'none')
        both = np.stack([data.codes, data.codes[:, ::-1]], 1)  # the second view is not read
        write_folder(tmp_path, both, data.labels, f'{split}80')
    probed(words, checkpoint, '--probes', 'knn')
    expected = [line for line in capsys.readouterr().out.splitlines() if line.startswith('* kNN')]
    probed(['--codebook-path', flags['--codebook-path'], '--train-token-file', tmp_path / 'train80_codes',
            '--val-token-file', tmp_path / 'val80_codes'], checkpoint, '--probes', 'knn')
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith('* kNN')] == expected
    fails(lambda: probed(['--train-token-file', tmp_path / 'train80_codes'], checkpoint), 'give --train-path')


# ---------------------------------------------------------------- codes themselves

def judged(*words):
    return call(probe, '--device', 'cpu', '--num-workers', 0, *words)


def test_codes_of_a_token_set_are_judged_without_a_checkpoint(tokens, tmp_path, capsys):
    words, _ = tokens
    judged(*words, '--neighbors', 5, '--output', tmp_path / 'p.json')
    found = json.loads((tmp_path / 'p.json').read_text())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('* ')]
    assert [line.split()[1] for line in lines] == ['kNN', 'linear', 'head'] == [
        'kNN' if name == 'knn' else name for name in found if name in probe.PROBES]
    assert found['dim'] == 32 and found['train'] == 40 and found['codes'].startswith('codes of ')
    # the class shows in which codes there are
    assert min(found[name]['acc1'] for name in ('knn', 'linear', 'head')) > 60
    judged(*words, '--probes', 'head', '--output', tmp_path / 'again.json')
    assert json.loads((tmp_path / 'again.json').read_text())['head'] == found['head'], 'nothing in it is random'

    pairs = dict(zip(words[::2], words[1::2]))
    codebook = load_codebook(pairs['--codebook-path'])
    data = TokenDataset(pairs['--val-token-file'], pairs['--val-label-file'], len(codebook), 'none')
    features, labels = probe.features_of(probe.MeanRow(), data, lambda codes: probe.look_up(codes.long(), codebook), 4,
                                         torch.device('cpu'))
    np.testing.assert_allclose(features, codebook[data.codes.astype(int)].mean(1), atol=1e-5)
    assert torch.equal(labels, torch.from_numpy(data.labels))


def test_codes_of_a_tokenizer_are_those_of_the_tokens_it_makes(images, tmp_path):
    folder = images[0][1]
    call(fit_patch_tokenizer, '--data-path', folder, '--output-dir', tmp_path, '--image-size', 32, '--patch-size', 4,
         '--dim', 32, '--codes', 40, '--iterations', 3)
    files = ['--tokenizer-path', tmp_path / 'tokenizer.pt', '--codebook-path', tmp_path / 'codebook.ckpt']
    call(tokenize_images, '--data-path', folder, '--name', 'my', '--output-dir', tmp_path, '--image-size', 32, *files,
         '--num-workers', 0, '--device', 'cpu')
    judged(*images[0], *files, '--tokenizer-input-size', 32, '--neighbors', 3, '--output', tmp_path / 'images.json')
    words = [word for split in ('train', 'val') for word in (
        f'--{split}-token-file', tmp_path / 'my-token.data.bin.gz', f'--{split}-label-file', tmp_path / 'my-label.txt')]
    judged(*words, *files[2:], '--neighbors', 3, '--output', tmp_path / 'tokens.json')
    of_images, of_tokens = (json.loads((tmp_path / f'{kind}.json').read_text()) for kind in ('images', 'tokens'))
    assert of_images.pop('codes') != of_tokens.pop('codes') and of_images == of_tokens
    fails(lambda: judged(*images[0], *files, '--tokenizer-input-size', 30), '--tokenizer-input-size 30: images of it')


@pytest.mark.parametrize('words, message', [
    (['--checkpoint', 'x.pth', '--probes', 'head'], '--probes head: is for codes'),
    ([], '--checkpoint: give the checkpoint to judge, or --codebook-path'),
    (['--tokenizer-path', 'x.pt'], '--tokenizer-path makes codes of images'),
])
def test_what_does_not_go_together(words, message):
    files = [word for flag in FILES[1:] for word in (flag, 'x')]
    fails(lambda: probe.parse_args([*files, *words]), message)
