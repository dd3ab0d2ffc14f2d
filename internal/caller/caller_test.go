package caller

import "testing"

func TestSees(t *testing.T) {
	for name, c := range map[string]struct {
		caller Caller
		owner  string
		want   bool
	}{
		"own":                  {Caller{Owner: "key:a"}, "key:a", true},
		"another's":            {Caller{Owner: "key:a"}, "key:b", false},
		"a longer name":        {Caller{Owner: "key:a"}, "key:ab", false},
		"nobody's":             {Caller{Owner: "key:a"}, "", false},
		"all":                  {Caller{Owner: "key:a", All: true}, "key:b", true},
		"all, nobody's":        {Caller{Owner: "key:a", All: true}, "", true},
		"nobody sees an owned": {Caller{}, "key:a", false},
		"nobody sees nobody's": {Caller{}, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := c.caller.Sees(c.owner); got != c.want {
				t.Errorf("%v", got)
			}
		})
	}
}
