package cli

// escapes finds what is meant for executorctl among the keys that are typed: at the
// start of a line "~." leaves and "~~" stands for "~", as with ssh.
type escapes struct {
	middle bool // of a line
	held   bool // a "~" at the start of a line waits for what follows
}

// filter returns what of keys is for the program. leave says that "~." was typed; what
// follows on that is dropped.
func (e *escapes) filter(keys []byte) (out []byte, leave bool) {
	out = make([]byte, 0, len(keys)+1)
	for _, k := range keys {
		switch {
		case e.held && k == '.':
			e.held = false
			return out, true
		case e.held && k == '~':
			e.held, e.middle = false, true
			out = append(out, '~')
			continue
		case e.held:
			e.held = false
			out = append(out, '~')
		case k == '~' && !e.middle:
			e.held = true
			continue
		}
		out = append(out, k)
		e.middle = k != '\r' && k != '\n'
	}
	return out, false
}

// rest is what was held back when no more keys come.
func (e *escapes) rest() []byte {
	if e.held {
		e.held = false
		return []byte{'~'}
	}
	return nil
}
