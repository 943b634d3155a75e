#!/bin/sh
# The Pythons to test with, "VERSION PATH" a line: those of 3.10 to 3.13 that are there, else python3.
found=
for version in 3.12 3.10 3.11 3.13; do
    for candidate in "python$version" "$(pyenv prefix "$version" 2>/dev/null)/bin/python"; do
        if path=$("$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null) && [ -n "$path" ] \
            && [ "$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$version" ]; then
            echo "$version $path"
            found=yes
            break
        fi
    done
done
[ -n "$found" ] || python3 -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.executable)'
