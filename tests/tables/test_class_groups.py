"""Top-1 over groups of classes."""
import json

from helpers import call, fails
from tables import class_groups

CSV = 'class,name,images,top1,top5,taken_for,taken_for_name,taken_for_images\n'


def test_a_group_is_the_mean_over_its_images(tmp_path):
    (tmp_path / 'classes.csv').write_text(CSV + '0,a,30,50.000,90.000,1,b,3\n1,b,10,100.000,100.000,,,\n2,c,0,,,,,\n')
    call(class_groups, '--report', tmp_path, '--group', 'G', 'a', 'b', 'c', '--output', tmp_path / 'g.json')
    assert json.loads((tmp_path / 'g.json').read_text()) == {'acc1': 62.5, 'images': 40}
    fails(lambda: call(class_groups, '--report', tmp_path, '--group', 'G', 'a', 'z', '--output', tmp_path / 'h.json'),
          'classes.csv: has no class z')
    fails(lambda: call(class_groups, '--report', tmp_path, '--group', 'G', '--output', 'x'), '--group G: name its')
    fails(lambda: call(class_groups, '--report', tmp_path / 'no', '--group', 'G', 'a', '--output', 'x'), 'classes.csv')
    assert not (tmp_path / 'h.json').exists()
