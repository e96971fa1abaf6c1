#!/bin/sh
#
# Runs each test case of NetBSD's below usr/tests: a line for each, its name, a
# tab, and what atf-test-program(1) says came of it.

here=$PWD
for program in $(find usr/tests -type f -name 't_*' | sort); do
	for name in $(./$program -l | sed -n 's/^ident: //p'); do
		rm -rf run result && mkdir run
		(cd run && timeout 60 $here/$program -s $here/${program%/*} \
		    -r $here/result $name) >/dev/null 2>&1 </dev/null
		echo "${program#usr/tests/}:$name	$(cat result || echo 'broken: no result')"
	done
done
