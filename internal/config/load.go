package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Problem is one thing wrong with the file.
type Problem struct {
	Line, Column int    // from 1; 0 when it concerns the file as a whole
	Key          string // dotted, such as "accounts.scanners.profile"
	Text         string // what is wrong and what was expected
}

// Error is every problem of a file, in the order of its lines.
type Error struct {
	Path     string
	Problems []Problem
}

func (e *Error) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		where := e.Path
		if p.Line > 0 {
			where = fmt.Sprintf("%s:%d:%d", e.Path, p.Line, p.Column)
		}
		if p.Key != "" {
			where += ": " + p.Key
		}
		lines[i] = where + ": " + p.Text
	}
	return strings.Join(lines, "\n")
}

// maxFile bounds the configuration file in bytes.
const maxFile = 4 << 20

// Find gives the file to read when none was named: ./mailbridge.toml, then /etc/mailbridge/mailbridge.toml.
func Find() (string, error) {
	tried := []string{"mailbridge.toml", "/etc/mailbridge/mailbridge.toml"}
	for _, p := range tried {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("there is no configuration file (looked for %s): write one as docs/configuration.md shows, or name it with --config FILE", strings.Join(tried, " and "))
}

// Load reads and checks the file at path. Its error is an *Error when the file could be read.
func Load(path string) (*File, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxFile {
		return nil, fmt.Errorf("%s is larger than a configuration can be (%d bytes)", path, maxFile)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, b)
}

// Parse reads and checks b; path is for messages and for resolving relative paths.
func Parse(path string, b []byte) (*File, error) {
	b = bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")) // editors on Windows write a byte order mark
	f := &File{Path: path}
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err := d.Decode(f)
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		return nil, &Error{path, unknownKeys(strict)}
	}
	if dec, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, col := dec.Position()
		text := strings.TrimPrefix(dec.Error(), "toml: ")
		return nil, &Error{path, []Problem{{line, col, strings.Join(dec.Key(), "."), text}}}
	}
	if err != nil {
		return nil, &Error{path, []Problem{{Text: strings.TrimPrefix(err.Error(), "toml: ")}}}
	}
	c := checker{f: f, at: positions(b)}
	c.check()
	if len(c.problems) > 0 {
		slices.SortStableFunc(c.problems, func(a, b Problem) int {
			return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		return nil, &Error{path, c.problems}
	}
	return f, nil
}

// Rel resolves a path of the file against the file's own folder, so that the service does not depend on
// where it is started.
func (f *File) Rel(p string) string {
	if p == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(filepath.Dir(f.Path), p)
}

// unknownKeys words the keys that nothing reads, with the nearest that something does.
func unknownKeys(strict *toml.StrictMissingError) []Problem {
	var ps []Problem
	for _, e := range strict.Errors {
		key := e.Key()
		line, col := e.Position()
		text := "there is no such setting"
		switch {
		case len(key) > 0 && key[0] == "imap":
			text = "this version sends only: reading by IMAP is not in it yet"
		case len(key) > 0:
			// Either the setting itself is mistyped or the table that it stands in.
			if near := cmp.Or(nearest(key[len(key)-1]), nearest(key[0])); near != "" {
				text += fmt.Sprintf("; did you mean %q?", near)
			}
			text += " (docs/configuration.md lists them all)"
		}
		ps = append(ps, Problem{line, col, strings.Join(key, "."), text})
	}
	return ps
}

// positions maps every dotted key of the document to its line and column. Elements of arrays of tables
// carry their index: "smtp.listen.0.address".
func positions(b []byte) map[string][2]int {
	at := map[string][2]int{}
	index := map[string]int{}
	var p unstable.Parser
	p.Reset(b)
	prefix := ""
	var keyValue func(prefix string, n *unstable.Node)
	put := func(key string, n *unstable.Node) {
		if _, ok := at[key]; !ok {
			off := int(n.Raw.Offset)
			line := 1 + bytes.Count(b[:off], []byte("\n"))
			at[key] = [2]int{line, off - bytes.LastIndexByte(b[:off], '\n')}
		}
	}
	join := func(prefix string, it unstable.Iterator) (string, *unstable.Node) {
		var last *unstable.Node
		for it.Next() {
			last = it.Node()
			prefix = strings.TrimPrefix(prefix+"."+string(last.Data), ".")
			// An element of [[x]] is meant by any later key below x.
			if i, ok := index[prefix]; ok && !it.IsLast() {
				prefix += "." + strconv.Itoa(i-1)
			}
		}
		return prefix, last
	}
	keyValue = func(prefix string, n *unstable.Node) {
		key, last := join(prefix, n.Key())
		if last == nil {
			return
		}
		put(key, last)
		if v := n.Value(); v.Kind == unstable.InlineTable {
			for it := v.Children(); it.Next(); {
				if it.Node().Kind == unstable.KeyValue {
					keyValue(key, it.Node())
				}
			}
		}
	}
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.KeyValue:
			keyValue(prefix, e)
		case unstable.Table:
			key, last := join("", e.Key())
			prefix = key
			if last != nil {
				put(key, last)
			}
		case unstable.ArrayTable:
			key, last := join("", e.Key())
			i := index[key]
			index[key] = i + 1
			prefix = key + "." + strconv.Itoa(i)
			if last != nil {
				put(prefix, last)
				put(key, last)
			}
		}
	}
	return at
}
