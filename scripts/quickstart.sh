#!/usr/bin/env bash
# Train the demo (Fashion-MNIST as tokens) on two CPU cores in a few minutes, evaluate it, and draw its curves.
# Makes or reuses .venv in the project; SEIT_OUTPUT changes where results go (default: output/quickstart). In a folder
# that an earlier quick start made, its files are removed first, and nothing else; no other folder is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

demo=demo
output=${SEIT_OUTPUT:-output/quickstart}
marker=$output/.quickstart  # says that the quick start made the folder
if [ ! -f "$marker" ] && [ -n "$(ls -A "$output" 2>/dev/null)" ]; then
    echo "error: $output: holds what the quick start did not make; name another folder in SEIT_OUTPUT" >&2
    exit 2
fi
mkdir -p "$output"
if ! "${PYTHON:-python3}" -c 'import fcntl, sys; fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)' \
    "$output/.lock" 2>/dev/null; then
    echo "error: $output: a run is writing there; wait for its end, or name another folder in SEIT_OUTPUT" >&2
    exit 2
fi
touch "$marker"
for name in checkpoint.pth checkpoint_previous.pth checkpoint_damaged.pth .checkpoint.pth.new .unsaved args.json \
    log.txt best_checkpoint.pth best_ema_checkpoint.pth curves.png predictions.csv; do
    rm -f "$output/$name"
done
if [ ! -L "$output/tokens" ]; then
    rm -f "$output"/tokens/png-{token.data.bin.gz,token.index.npy.gz,token.json,label.txt}
    rm -rf "$output/tokens/.png.parts"
fi
. scripts/venv.sh requirements.txt requirements-plot.txt

data=(--codebook-path $demo/codebook.ckpt --token-synonym-dict $demo/synonyms.json
    --train-token-file $demo/fashion-train-token.data.bin --train-label-file $demo/fashion-train-label.txt
    --val-token-file $demo/fashion-val-token.data.bin --val-label-file $demo/fashion-val-label.txt
    --token-cache "$output")
model=(--model deit_tiny_token_32 --model-kwargs depth=4 embed_dim=128 num_heads=4 --input-size 64 --device cpu)
# The published recipe is made for 300 epochs; for 12 it is too strong (noise above all) and too slow to warm up.
recipe=(--epochs 12 --batch-size 100 --unscale-lr --lr 2e-3 --warmup-epochs 1 --warmup-lr 5e-4 --drop-path 0
    --rrc-ratio 0.6 --token-noise-prob 0.05 --mixup-prob 0.2 --model-ema-decay 0.99)

python main_seit.py "${model[@]}" "${data[@]}" "${recipe[@]}" --output_dir "$output"
python scripts/plot_log.py "$output/log.txt" --output "$output/curves.png"

echo "--- the best checkpoint on all validation tokens"
evaluate=(python main_seit.py "${model[@]}" "${data[@]}" --eval --no-model-ema --resume "$output/best_checkpoint.pth")
"${evaluate[@]}"

echo "--- the same on ${demo}'s PNG images: as tokens made from them, then on the images themselves"
python tokenize_images.py --data-path $demo/images/val --name png --output-dir "$output/tokens" --image-size 64 \
    --tokenizer-path $demo/tokenizer.pt --codebook-path $demo/codebook.ckpt --device cpu
"${evaluate[@]}" --val-token-file "$output/tokens/png-token.data.bin.gz" --val-label-file "$output/tokens/png-label.txt"
python evaluate_on_images.py "${model[@]:0:6}" --device cpu --model-path "$output/best_checkpoint.pth" \
    --codebook-path $demo/codebook.ckpt --tokenizer-path $demo/tokenizer.pt --tokenizer-input-size 64 \
    --vit-input-size 8 --num_workers 2 --data-path $demo/images/val --save-predictions "$output/predictions.csv"
rm -f "$output"/*.codes-*.npy

echo "--- done"
python - "$output" <<'PY'
import json
import os
import sys
from pathlib import Path

output, demo = sys.argv[1], Path('demo')
best = json.loads(Path(output, 'log.txt').read_text().splitlines()[-1])['best_acc1']
images = json.loads((demo / 'fashion-val-token.json').read_text())['images']
tokens = sum(os.path.getsize(demo / f'fashion-val-token.{part}.bin') for part in ('data', 'model')) / images
pngs = [p.stat().st_size for p in (demo / 'images').rglob('*.png')]
print(f'top-1        {best:.2f} %')
print(f'checkpoint   {output}/best_checkpoint.pth')
print(f'log          {output}/log.txt')
print(f'curves       {output}/curves.png')
print(f'predictions  {output}/predictions.csv')
print(f'storage      {tokens:.0f} bytes an image as tokens, {sum(pngs) / len(pngs):.0f} as PNG')
PY
