#!/bin/bash
# Medusa heads, an EAGLE-3 draft and a draft model for the embedded model, and a model trained together with its heads
# (Medusa-2), on one GPU. LIMIT and DATA_LIMIT bound its time.
#
#   DATA=folder OUT=results bash benchmarks/gpu_training.sh
#
# DATA holds train_chat.txt.xz, train_prose.txt.xz and dev_prompts.jsonl. OUT gets medusa/, eagle3/, draft/, medusa-2/ (a
# model with its heads in medusa-2/medusa/), a summary and a log of each, and trees.txt. The draft and the EAGLE-3 draft
# go on from the shipped ones; INIT= and INIT_EAGLE= name others. Settings that change the length of the run come from
# the environment, as below. Fails if any part fails; what has finished by then is whole.
set -u
DATA=${DATA:-.carry}
OUT=${OUT:-/tmp/out}
ASSETS=${ASSETS:-src/autobot_llm/assets}
MODEL=${MODEL:-$ASSETS/tiny}
INIT=${INIT:-$ASSETS/tiny-draft}
INIT_EAGLE=${INIT_EAGLE:-$ASSETS/tiny-eagle3}
WORK=${WORK:-/tmp/training}         # the answers: some 300 MB
LIMIT=${LIMIT:-480}                 # seconds of learning; EAGLE-3 takes all of them
DATA_LIMIT=${DATA_LIMIT:-75}        # seconds of answering
NUM_CHATS=${NUM_CHATS:-20480}
NUM_EVAL_PROMPTS=${NUM_EVAL_PROMPTS:-1000}
MIXED=${MIXED:-}                    # options of training_prompts.py
LENGTH=${LENGTH:-960}               # tokens of a chat and its answer
LONG_LENGTH=${LONG_LENGTH:-1472}    # of the longest prompts and their answers
ANSWER_BATCH=${ANSWER_BATCH:-2048}  # 1024 where memory does not suffice
BATCH=${BATCH:-16384}               # tokens of a step
EVERY=${EVERY:-1000}
mkdir -p "$WORK" "$OUT"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
PYTHON=${PYTHON:-python3}
failed=0

train() {
    $PYTHON -c 'import sys; from autobot_llm.cli.main import main; sys.exit(main())' train "$@"
}

# the target's own answers, half of them greedy; and greedy ones to held-out prompts, to measure with
answers=(--model "$MODEL" --answer-tokens 192 --temperatures 0,0.7,0,1.0 --answer-batch-size "$ANSWER_BATCH"
    --time-limit "$DATA_LIMIT" --json)
# shellcheck disable=SC2086  # several options
$PYTHON benchmarks/training_prompts.py --chat "$DATA/train_chat.txt.xz" --prose "$DATA/train_prose.txt.xz" \
    --held-out "$DATA/dev_prompts.jsonl" --out "$WORK/mixed.jsonl" $MIXED || exit 1
train data "${answers[@]}" --data "$WORK/mixed.jsonl" --out "$WORK/mixed.safetensors" --num-prompts 1000000 \
    --sequence-length "$LONG_LENGTH" >"$OUT/mixed.json" 2>"$OUT/mixed.log" &
mixed=$!
train data "${answers[@]}" --data "$DATA/train_chat.txt.xz" --out "$WORK/chat.safetensors" --num-prompts "$NUM_CHATS" \
    --sequence-length "$LENGTH" >"$OUT/chat.json" 2>"$OUT/chat.log" &
chat=$!
train data --model "$MODEL" --data "$DATA/dev_prompts.jsonl" --out "$WORK/dev.safetensors" \
    --num-prompts "$NUM_EVAL_PROMPTS" --sequence-length "$LONG_LENGTH" --answer-tokens 160 --temperatures 0 \
    --answer-batch-size 256 --json >"$OUT/dev.json" 2>"$OUT/dev.log" || failed=1
for job in $mixed $chat; do wait "$job" || failed=1; done
cat "$OUT/mixed.json" "$OUT/chat.json" "$OUT/dev.json"
date -u

# all at once: their kernels are small, and one alone leaves most of the GPU idle
common=(--model "$MODEL" --data "$WORK/mixed.safetensors" --data "$WORK/chat.safetensors"
    --eval-data "$WORK/dev.safetensors" --steps 1000000 --batch-size "$BATCH" --evaluate-every "$EVERY" --json)
learn() { # a name, and the options of its training
    local name=$1
    shift
    train "$@" "${common[@]}" --out "$OUT/$name" >"$OUT/$name.json" 2>"$OUT/$name.log"
}
heads() {
    learn medusa medusa --learning-rate 2e-3 --num-layers 5 --time-limit $((LIMIT * 2 / 5)) &&
        learn medusa-2 medusa --stage 2 --init "$OUT/medusa" --model-rate 0.2 --learning-rate 1e-3 \
            --time-limit $((LIMIT * 3 / 5))
}
heads &
heads=$!
learn eagle3 eagle3 --learning-rate 1e-3 --init "$INIT_EAGLE" --draft-vocab-size 8192 --time-limit "$LIMIT" &
eagle3=$!
learn draft draft --learning-rate 1e-3 --init "$INIT" --time-limit $((LIMIT * 3 / 5)) &
draft=$!
for job in $heads $eagle3 $draft; do wait "$job" || failed=1; done
date -u
train tree "$OUT/medusa" --json >"$OUT/trees.json" || failed=1
train tree "$OUT/medusa" | tee "$OUT/trees.txt"
tail -n 3 "$OUT"/*.log
ls -l "$OUT" "$OUT"/*/
exit $failed
