"""How fast this project is on this machine. docs/performance.md holds results.

    python benchmarks/data.py --device cpu --threads 1         token file to model input, beside plain one-hot code
    python benchmarks/train.py --model deit_base_token_32 --batch-size 512 --amp bf16 --compile      training steps
    python benchmarks/start.py --ranks 1 4                     process start to first batch, and memory
    python benchmarks/formats.py --token-file FILE             token formats: bytes, encoding and decoding
    python benchmarks/encode.py --amp off bf16 --compile       images to codes
    python benchmarks/evaluate.py --model deit_base_token_32 --amp bf16     evaluation on tokens and on images

Each ends in one JSON line on standard output. A measured number there is {"median", "min", "max"} over --repeats rounds
after a warm-up; variants that are compared take turns, so that a drift of the machine hits all alike. Data are random,
of ImageNet's sizes by default, in a temporary folder. `train.py` and `evaluate.py` take the flags of main_seit.py too.
Begin reading at common.py, which all of them share.
"""
