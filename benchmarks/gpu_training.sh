#!/bin/bash
# Medusa heads, an EAGLE-3 draft and a draft model for the embedded model, on one GPU. LIMIT and DATA_LIMIT bound its time.
#
#   DATA=folder OUT=results bash benchmarks/gpu_training.sh
#
# DATA holds train_chat.txt.xz, train_prose.txt.xz, dev_prompts.jsonl and tiny-draft (the draft that is trained further).
# OUT gets medusa/, eagle3/, draft/ (no file over 6 MB), a summary and a log of each, and trees.txt. Settings that change
# the length of the run come from the environment, as below. Fails if any part fails.
set -u
DATA=${DATA:-.carry}
OUT=${OUT:-/tmp/out}
MODEL=${MODEL:-src/autobot_llm/assets/tiny}
INIT=${INIT:-$DATA/tiny-draft}
WORK=${WORK:-/tmp/training}         # the answers: some 100 MB
LIMIT=${LIMIT:-270}                 # seconds of learning
DATA_LIMIT=${DATA_LIMIT:-75}        # seconds of answering
NUM_PROMPTS=${NUM_PROMPTS:-40960}
NUM_EVAL_PROMPTS=${NUM_EVAL_PROMPTS:-1000}
LENGTH=${LENGTH:-1152}              # tokens of a prompt and its answer
EVAL_LENGTH=${EVAL_LENGTH:-1472}
ANSWER_BATCH=${ANSWER_BATCH:-2048}  # 1024 where memory does not suffice
BATCH=${BATCH:-16384}               # tokens of a step
EVERY=${EVERY:-500}
mkdir -p "$WORK" "$OUT"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
failed=0

train() {
    ${PYTHON:-python3} -c 'import sys; from autobot_llm.cli.main import main; sys.exit(main())' train "$@"
}

# the target's own answers, half of them greedy; and greedy ones to held-out prompts, to measure with
train data --model "$MODEL" --data "$DATA/train_chat.txt.xz" --data "$DATA/train_prose.txt.xz" \
    --out "$WORK/learn.safetensors" --num-prompts "$NUM_PROMPTS" --sequence-length "$LENGTH" --answer-tokens 256 \
    --temperatures 0,0.7,0,1.0 --answer-batch-size "$ANSWER_BATCH" --time-limit "$DATA_LIMIT" --json \
    >"$OUT/data.json" 2>"$OUT/data.log" &
learn=$!
train data --model "$MODEL" --data "$DATA/dev_prompts.jsonl" --out "$WORK/dev.safetensors" \
    --num-prompts "$NUM_EVAL_PROMPTS" --sequence-length "$EVAL_LENGTH" --answer-tokens 160 --temperatures 0 \
    --answer-batch-size 256 --json >"$OUT/dev.json" 2>"$OUT/dev.log" || failed=1
wait $learn || failed=1
cat "$OUT/data.json" "$OUT/dev.json"
date -u

# all three at once: their kernels are small, and one alone leaves most of the GPU idle
common=(--model "$MODEL" --data "$WORK/learn.safetensors" --eval-data "$WORK/dev.safetensors" --steps 1000000
    --time-limit "$LIMIT" --batch-size "$BATCH" --evaluate-every "$EVERY" --json)
train medusa "${common[@]}" --out "$OUT/medusa" --learning-rate 2e-3 >"$OUT/medusa.json" 2>"$OUT/medusa.log" &
medusa=$!
train eagle3 "${common[@]}" --out "$OUT/eagle3" --learning-rate 1e-3 --feature-layers 2,5,8 \
    --draft-vocab-size 6144 \
    >"$OUT/eagle3.json" 2>"$OUT/eagle3.log" &
eagle3=$!
train draft "${common[@]}" --out "$OUT/draft" --init "$INIT" --learning-rate 1e-3 \
    >"$OUT/draft.json" 2>"$OUT/draft.log" &
draft=$!
for job in $medusa $eagle3 $draft; do wait "$job" || failed=1; done
date -u
train tree "$OUT/medusa" --json >"$OUT/trees.json" || failed=1
train tree "$OUT/medusa" | tee "$OUT/trees.txt"
tail -n 3 "$OUT"/*.log
ls -l "$OUT" "$OUT"/*/
exit $failed
