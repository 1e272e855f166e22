#!/usr/bin/env bash
# Collects the wheels that benchmarks/kernels.py needs on a GPU host without network, in parts
# that travel one by one, and joins them there. docs/gpu.md says which host and what for.
#
#   scripts/gpu_bundle.sh [--part-mib N] [--to FOLDER] [PACKAGE...]   collect into FOLDER/part<i>
#   scripts/gpu_bundle.sh --join [FROM [TO]]                          check and join there
#
# Defaults: 60 MiB, .whl; --join .whl /tmp/ess_wheels. PACKAGEs are added to the ones below;
# versions are those of constraints.txt. A wheel that outgrows a part travels in pieces.
# PYTHON_VERSION=3.12 names the host's Python; PYTHON the interpreter whose pip downloads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# sglang: HiSparse's swap-in kernel and merge_state. tvm-ffi, ninja: compile it, and our csrc/.
# sgl-flash-mla: FlashMLA. The others: what `import sglang` asks for and such a host lacks.
PACKAGES=(sglang apache-tvm-ffi ninja sgl-flash-mla msgspec orjson pybase64 starlette pyzmq)
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
GLIBC_MINORS=(39 36 35 34 31 28 27 24 17) # pip matches manylinux_2_N exactly

say() { echo "gpu_bundle: $*" >&2; }

die() {
  say "$*"
  exit 1
}

find_python() { # prints an interpreter that has pip
  local name
  for name in ${PYTHON:-.venv/bin/python python3}; do
    if "$name" -m pip --version >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  return 1
}

download() { # folder package...
  local folder=$1 python minor platforms=()
  shift
  python=$(find_python) || die "a Python with pip must be there: got none. Set PYTHON."
  for minor in "${GLIBC_MINORS[@]}"; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary=:all: --implementation cp --python-version "$PYTHON_VERSION" \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    -c constraints.txt -d "$folder" "$@" </dev/null ||
    die "pip must find a wheel for Python $PYTHON_VERSION on x86-64: got the error above."
}

new_part() { # uses and sets: part, used
  part=$((part + 1)) used=0
  mkdir "$to/part$part"
}

collect() { # part_mib to package...
  local limit=$(($1 << 20)) to=$2 file size part=0 used=0 piece
  shift 2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/all" "$work/pieces"
  download "$work/all" "${PACKAGES[@]}" "$@"
  rm -rf "$to"/part*
  mkdir -p "$to"
  (cd "$work/all" && sha256sum -- *.whl) >"$work/SHA256SUMS"
  # Room in every part for the list of checksums.
  limit=$((limit - $(stat -c %s "$work/SHA256SUMS")))
  for file in "$work"/all/*.whl; do
    if [ "$(stat -c %s "$file")" -gt "$limit" ]; then
      split -b "$limit" -d -a 3 "$file" "$work/pieces/$(basename "$file").piece"
    else
      ln "$file" "$work/pieces/"
    fi
  done
  new_part
  while IFS= read -r piece; do # the largest first, so that small ones fill the last part
    size=$(stat -c %s "$work/pieces/$piece")
    if [ "$used" -gt 0 ] && [ $((used + size)) -gt "$limit" ]; then new_part; fi
    mv "$work/pieces/$piece" "$to/part$part/"
    used=$((used + size))
  done < <(cd "$work/pieces" && ls -S)
  for ((i = 1; i <= part; i++)); do cp "$work/SHA256SUMS" "$to/part$i/"; done
  for ((i = 1; i <= part; i++)); do
    printf '%s/part%d  %s KiB\n' "$to" "$i" "$(du -sk --apparent-size "$to/part$i" | cut -f1)"
    (cd "$to/part$i" && du -k --apparent-size -- *.whl* | sort -rn)
  done
}

join() { # from to: what is whole goes to `to`; says what is still to come
  local from=$1 to=$2 sums name sum missing=0
  sums=$(find "$from" -name SHA256SUMS -print -quit 2>/dev/null)
  [ -n "$sums" ] || die "$from must hold parts of a bundle: got no SHA256SUMS."
  mkdir -p "$to"
  find "$from" -type f -name '*.whl*' -exec cp -n {} "$to/" \;
  while read -r sum name; do
    if [ ! -f "$to/$name" ] && compgen -G "$to/$name.piece*" >/dev/null; then
      cat "$to/$name".piece* >"$to/$name.joined"
      if echo "$sum  $to/$name.joined" | sha256sum --check --status -; then
        mv "$to/$name.joined" "$to/$name"
        rm -f "$to/$name".piece*
      else
        rm -f "$to/$name.joined" # a piece is still to come
      fi
    fi
    if [ ! -f "$to/$name" ]; then
      say "$name: in a part that is not here"
      missing=1
    elif ! echo "$sum  $to/$name" | sha256sum --check --quiet - >&2; then
      rm -f "$to/$name"
      die "$name must have the checksum it left with: got another. Carry its part again."
    fi
  done <"$sums"
  return $missing
}

part_mib=60 to=.whl
if [ "${1:-}" = --join ]; then
  join "${2:-.whl}" "${3:-/tmp/ess_wheels}"
  exit
fi
while [ $# -gt 0 ]; do
  case $1 in
    --part-mib) part_mib=$2 && shift 2 ;;
    --to) to=$2 && shift 2 ;;
    -*) die "an option must be --part-mib, --to or --join: got $1." ;;
    *) break ;;
  esac
done
collect "$part_mib" "$to" "$@"
