package memory

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

// graph is a knowledge graph as the memory MCP server keeps it: a JSON object on each
// line of a file, which it writes whole with each change.
type graph struct {
	entities  []entity
	relations []relation
	// others are lines of kinds that are not known, as they are.
	others []string
}

// entity is something known, with what is known about it.
type entity struct {
	name, kind   string
	observations []string
	// rest are fields that are not known.
	rest map[string]json.RawMessage
}

// relation joins two entities.
type relation struct {
	From string `json:"from"`
	To   string `json:"to"`
	Type string `json:"relationType"`
}

// parse reads a graph, and says how many of its lines are no JSON objects.
func parse(data []byte) (g graph, damaged int) {
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		var fields map[string]json.RawMessage
		if json.Unmarshal(line, &fields) != nil || fields == nil {
			damaged++
			continue
		}
		var kind string
		_ = json.Unmarshal(fields["type"], &kind) // another type is another kind
		switch kind {
		case "entity":
			e, ok := entityOf(fields)
			if !ok {
				damaged++
				continue
			}
			g.add(e)
		case "relation":
			var r relation
			if json.Unmarshal(line, &r) != nil {
				damaged++
				continue
			}
			if !slices.Contains(g.relations, r) {
				g.relations = append(g.relations, r)
			}
		default:
			if text := string(line); !slices.Contains(g.others, text) {
				g.others = append(g.others, text)
			}
		}
	}
	return g, damaged
}

func entityOf(fields map[string]json.RawMessage) (entity, bool) {
	var e entity
	for name, to := range map[string]any{"name": &e.name, "entityType": &e.kind, "observations": &e.observations} {
		if raw, ok := fields[name]; ok && json.Unmarshal(raw, to) != nil {
			return entity{}, false
		}
		delete(fields, name)
	}
	delete(fields, "type")
	e.rest = fields
	return e, e.name != ""
}

// add adds an entity, or what it says to the one of its name.
func (g *graph) add(e entity) {
	if i := g.find(e.name); i >= 0 {
		g.entities[i].observations = union(g.entities[i].observations, e.observations)
		return
	}
	e.observations = union(nil, e.observations)
	g.entities = append(g.entities, e)
}

func (g *graph) find(name string) int {
	return slices.IndexFunc(g.entities, func(e entity) bool { return e.name == name })
}

// byName are the entities by their name.
func (g *graph) byName() map[string]entity {
	all := make(map[string]entity, len(g.entities))
	for _, e := range g.entities {
		all[e.name] = e
	}
	return all
}

// encode writes a graph as the server does.
func (g *graph) encode() ([]byte, error) {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	for _, e := range g.entities {
		fields := make(map[string]any, len(e.rest)+4)
		for name, raw := range e.rest {
			fields[name] = raw
		}
		observations := e.observations
		if observations == nil {
			observations = []string{}
		}
		fields["type"], fields["name"], fields["entityType"], fields["observations"] = "entity", e.name, e.kind, observations
		if err := encoder.Encode(fields); err != nil {
			return nil, fmt.Errorf("write entity %q: %w", e.name, err)
		}
	}
	for _, r := range g.relations {
		if err := encoder.Encode(struct {
			Type string `json:"type"`
			relation
		}{"relation", r}); err != nil {
			return nil, fmt.Errorf("write a relation of %q: %w", r.From, err)
		}
	}
	for _, line := range g.others {
		out.WriteString(line + "\n")
	}
	return out.Bytes(), nil
}

// merge does to theirs what was done to base to make ours of it: observation by
// observation, relation by relation. What both did counts once. An entity goes when we deleted it,
// unless others have learned something about it since.
func merge(base, ours, theirs graph) graph {
	was, is := base.byName(), ours.byName()
	var merged graph
	gone := make(map[string]bool)
	for _, e := range theirs.entities {
		old, known := was[e.name]
		mine, kept := is[e.name]
		switch {
		case !kept && known:
			e.observations = minus(e.observations, old.observations)
			if len(e.observations) == 0 {
				gone[e.name] = true
				continue
			}
		case kept:
			e.observations = union(minus(e.observations, minus(old.observations, mine.observations)), minus(mine.observations, old.observations))
			if mine.kind != old.kind || !known {
				e.kind = mine.kind
			}
			rest := maps.Clone(e.rest)
			for name, raw := range mine.rest {
				if !bytes.Equal(raw, old.rest[name]) {
					if rest == nil {
						rest = make(map[string]json.RawMessage)
					}
					rest[name] = raw
				}
			}
			e.rest = rest
		}
		merged.entities = append(merged.entities, e)
	}
	here := theirs.byName()
	for _, e := range ours.entities {
		if _, there := here[e.name]; there {
			continue
		}
		if old, known := was[e.name]; known {
			// Deleted by others: what we learned since stays.
			e.observations = minus(e.observations, old.observations)
			if len(e.observations) == 0 {
				gone[e.name] = true
				continue
			}
		}
		merged.entities = append(merged.entities, e)
	}
	merged.relations = union(minus(theirs.relations, minus(base.relations, ours.relations)), minus(ours.relations, base.relations))
	merged.relations = slices.DeleteFunc(merged.relations, func(r relation) bool { return gone[r.From] || gone[r.To] })
	merged.others = union(minus(theirs.others, minus(base.others, ours.others)), minus(ours.others, base.others))
	return merged
}

// union is a and what of b is not in it, each once.
func union[T comparable](a, b []T) []T {
	seen := make(map[T]bool, len(a)+len(b))
	var all []T
	for _, list := range [][]T{a, b} {
		for _, v := range list {
			if !seen[v] {
				seen[v] = true
				all = append(all, v)
			}
		}
	}
	return all
}

// minus is a without what is in b.
func minus[T comparable](a, b []T) []T {
	without := make(map[T]bool, len(b))
	for _, v := range b {
		without[v] = true
	}
	var all []T
	for _, v := range a {
		if !without[v] {
			all = append(all, v)
		}
	}
	return all
}

// seedGraph reads a seed: a graph, or one JSON object with entities and relations.
func seedGraph(data []byte) (graph, error) {
	var whole struct {
		Entities  []map[string]json.RawMessage `json:"entities"`
		Relations []relation                   `json:"relations"`
	}
	if json.Unmarshal(data, &whole) == nil && whole.Entities != nil {
		var g graph
		for i, fields := range whole.Entities {
			e, ok := entityOf(fields)
			if !ok {
				return graph{}, fmt.Errorf("entity %d of the seed is none", i)
			}
			g.add(e)
		}
		g.relations = union(nil, whole.Relations)
		return g, nil
	}
	g, damaged := parse(data)
	if damaged > 0 {
		return graph{}, fmt.Errorf("%d lines of the seed are neither entities nor relations", damaged)
	}
	return g, nil
}
