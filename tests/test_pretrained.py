"""Starting from other weights."""
import functools
import http.server
import threading

import pytest
import timm
import torch

from pretrained import load_pretrained
from utils import InputError


def tiny(**kwargs):
    return timm.create_model('deit_tiny_token_32', **{'depth': 1, **kwargs})


def test_finetune_from_an_address(tmp_path):
    """A local server stands for the web."""
    model = tiny()
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *a: None
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        other = tiny()
        load_pretrained(other, f'{address}/w.pth')
        assert torch.equal(other.head.weight, model.head.weight)
        with pytest.raises(InputError, match='gone.pth: cannot be fetched'):
            load_pretrained(other, f'{address}/gone.pth')
        server.shutdown()


def test_finetune_resamples_positions_and_drops_what_differs(tmp_path, capsys):
    old = tiny(num_classes=5, img_size=28)
    torch.save({'model': old.state_dict()}, tmp_path / 'old.pth')
    new = tiny(num_classes=3, img_size=20)
    head = new.head.weight.clone()
    load_pretrained(new, str(tmp_path / 'old.pth'))
    assert torch.equal(new.head.weight, head)
    assert torch.equal(new.blocks[0].mlp.fc1.weight, old.blocks[0].mlp.fc1.weight)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    grid = old.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    slow = torch.nn.functional.interpolate(grid, (10, 10), mode='bicubic', align_corners=False)
    torch.testing.assert_close(new.pos_embed[:, 1:], slow.flatten(2).transpose(1, 2))
    torch.save({'model': {k: v for k, v in old.state_dict().items() if 'head' not in k}}, tmp_path / 'headless.pth')
    load_pretrained(old, str(tmp_path / 'headless.pth'))
    assert '--finetune: head.weight starts from scratch (in the file: none)' in capsys.readouterr().out
    with pytest.raises(InputError, match='blocks.1.norm1.weight: missing'):
        load_pretrained(tiny(depth=2), str(tmp_path / 'old.pth'))


@pytest.mark.parametrize('prefix, said', [(2, 'the first are taken'), (0, 'missing ones start from scratch')])
def test_finetune_from_two_prefix_tokens_or_none(prefix, said, tmp_path, capsys):
    model = tiny()
    weights = dict(model.state_dict())
    positions = torch.randn(1, prefix + 196, 192)
    weights['pos_embed'] = positions
    if prefix == 2:
        weights |= {'dist_token': torch.zeros(1, 1, 192), 'head_dist.weight': torch.zeros(1000, 192),
                    'head_dist.bias': torch.zeros(1000)}
    torch.save({'model': weights}, tmp_path / 'w.pth')
    own = model.pos_embed[:, 0].clone()
    load_pretrained(model, str(tmp_path / 'w.pth'))
    output = capsys.readouterr().out
    assert said in output and ('dist_token is left out' in output) == (prefix == 2)
    assert torch.equal(model.pos_embed[:, 1:], positions[:, prefix:])
    assert torch.equal(model.pos_embed[:, 0], positions[:, 0] if prefix else own)


@pytest.mark.parametrize('shape', [(1, 200, 192), (1, 197, 100), (197, 192), (1, 0, 192)])
def test_finetune_from_positions_of_no_square_is_one_line(shape, tmp_path):
    torch.save({'model': {**tiny().state_dict(), 'pos_embed': torch.zeros(shape)}}, tmp_path / 'w.pth')
    with pytest.raises(InputError, match='w.pth: position embeddings of shape'):
        load_pretrained(tiny(), str(tmp_path / 'w.pth'))
