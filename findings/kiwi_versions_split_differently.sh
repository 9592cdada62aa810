#!/usr/bin/env bash
# kiwipiepy splits plain polite Korean sentences into other morphemes from one release to the next, so scores do not compare.
#
# Packages: kiwipiepy 0.20.4 (kiwipiepy_model 0.20.0) and 0.24.1 (0.24.0), default settings.
# Input: four ordinary sentences in standard spelling.
# Behaviour: BLEU and ROUGE of Korean texts are commonly counted over such morphemes. 0.20.4 takes the ending of 오네요 for
#   two (네 요) and that of 좋네요 for one (네요), 0.24.1 takes both for one; 지루할까 goes the other way. Other n-grams and
#   other lengths are other scores for the same texts, so a score has to name the version.
# Seen:
#   0.20.4: 32 morphemes, 그 목소리 가 아직 기억 에 남 네 요 . | 오늘 도 비 가 오 네 요 . | 날씨 가 좋 네요 . | 지루하 ᆯ까 싶 ...
#   0.24.1: 31 morphemes, 그 목소리 가 아직 기억 에 남 네요 . | 오늘 도 비 가 오 네요 . | 날씨 가 좋 네요 . | 지루 하 ᆯ까 싶 ...
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
cat > "$folder/run.py" <<'PY'
from kiwipiepy import Kiwi

kiwi = Kiwi()
for sentence in ("그 목소리가 아직 기억에 남네요.", "오늘도 비가 오네요.", "날씨가 좋네요.", "지루할까 싶었는데 재미있었어요."):
    print(" ".join(token.form for token in kiwi.tokenize(sentence)))
PY
for version in 0.20.4 0.24.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "kiwipiepy==$version" "kiwipiepy_model==${version%.*}.0"
    "$folder/$version/bin/python" "$folder/run.py" > "$folder/$version.txt"
    echo "$version: $(wc -w < "$folder/$version.txt") morphemes, $(paste -sd'|' "$folder/$version.txt")"
done
differing=$(diff "$folder/0.20.4.txt" "$folder/0.24.1.txt" | grep -c '^<' || true)
echo "sentences with other morphemes: $differing of 4"
[ "$differing" = 3 ] || exit 1
echo "still so"
