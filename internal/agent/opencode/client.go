package opencode

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// callTime bounds a call that does not wait for a model.
	callTime = 30 * time.Second
	// mcpTime bounds the start of the servers of tools.
	mcpTime = 3 * time.Minute
)

// answerLimit bounds an answer: what runs in the sandbox is not trusted.
const answerLimit = 256 << 20

// client speaks OpenCode's v1 HTTP API.
type client struct {
	http *http.Client
	// password is asked for each request: a server that was started again has another.
	password func() string
}

// statusError is an answer that is not a success.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("opencode answers %d: %s", e.code, e.text)
}

func isStatus(err error, code int) bool {
	var status *statusError
	return errors.As(err, &status) && status.code == code
}

func newClient(dial func(ctx context.Context) (net.Conn, error), password func() string) *client {
	return &client{password: password, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		// Bun closes idle connections after ten seconds, and a POST on one would fail.
		IdleConnTimeout:    4 * time.Second,
		MaxIdleConns:       4,
		DisableCompression: true,
	}}}
}

// call makes a request and reads its answer into out, which may be nil.
func (c *client) call(ctx context.Context, method, path, directory string, in, out any) error {
	response, err := c.open(ctx, method, path, directory, in)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer response.Body.Close()
	body := io.LimitReader(response.Body, answerLimit)
	if out == nil {
		_, err = io.Copy(io.Discard, body)
	} else {
		err = json.NewDecoder(body).Decode(out)
	}
	if err != nil {
		return fmt.Errorf("%s %s: read answer: %w", method, path, err)
	}
	return nil
}

func (c *client) open(ctx context.Context, method, path, directory string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://opencode"+path, body)
	if err != nil {
		return nil, err
	}
	request.SetBasicAuth("opencode", c.password())
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if directory != "" {
		request.Header.Set("X-Opencode-Directory", url.PathEscape(directory))
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode < 200 || response.StatusCode > 299 {
		defer response.Body.Close()
		return nil, &statusError{code: response.StatusCode, text: reason(response.Body)}
	}
	return response, nil
}

// reason is what an answer says about an error.
func reason(body io.Reader) string {
	data, err := io.ReadAll(io.LimitReader(body, 64<<10))
	if err != nil && len(data) == 0 {
		return err.Error()
	}
	var f failure
	if json.Unmarshal(data, &f) == nil && f.Data.Message != "" {
		return f.Data.Message
	}
	return strings.ToValidUTF8(strings.TrimSpace(string(data[:min(len(data), 500)])), "�")
}

func (c *client) health(ctx context.Context) (version string, err error) {
	var out struct {
		Healthy bool   `json:"healthy"`
		Version string `json:"version"`
	}
	if err := c.call(ctx, http.MethodGet, "/global/health", "", nil, &out); err != nil {
		return "", err
	}
	if !out.Healthy {
		return "", errors.New("opencode says that it is not healthy")
	}
	return out.Version, nil
}

// MCP is a server of tools as OpenCode sees it.
type MCP struct {
	Name string
	// State is connected, disabled, failed, needs_auth or needs_client_registration.
	State string
	// Detail is why it failed.
	Detail string
}

func (c *client) mcp(ctx context.Context, directory string) (map[string]struct{ Status, Error string }, error) {
	var out map[string]struct{ Status, Error string }
	// It starts them, and waits for as long as their configuration says.
	ctx, stop := context.WithTimeoutCause(ctx, mcpTime, fmt.Errorf("no answer within %v", mcpTime))
	defer stop()
	err := c.call(ctx, http.MethodGet, "/mcp", directory, nil, &out)
	return out, err
}

// api is the client for one directory.
type api struct {
	*client
	directory string
}

func (a api) do(ctx context.Context, method, path string, in, out any) error {
	ctx, stop := context.WithTimeoutCause(ctx, callTime, fmt.Errorf("no answer within %v", callTime))
	defer stop()
	return a.call(ctx, method, path, a.directory, in, out)
}

func (a api) create(ctx context.Context, in any) (s session, err error) {
	return s, a.do(ctx, http.MethodPost, "/session", in, &s)
}

func (a api) session(ctx context.Context, id string) (s session, err error) {
	return s, a.do(ctx, http.MethodGet, "/session/"+id, nil, &s)
}

// prompt is answered when the turn is over; its context must allow for that.
func (a api) prompt(ctx context.Context, id string, in any) (m stored, err error) {
	return m, a.call(ctx, http.MethodPost, "/session/"+id+"/message", a.directory, in, &m)
}

func (a api) abort(ctx context.Context, id string) error {
	return a.do(ctx, http.MethodPost, "/session/"+id+"/abort", nil, nil)
}

// has returns nil if a conversation has this message; 404 if not.
func (a api) has(ctx context.Context, id, message string) error {
	return a.do(ctx, http.MethodGet, "/session/"+id+"/message/"+message, nil, nil)
}

// messages are the newest of a conversation, the oldest of them first; all if limit is 0.
func (a api) messages(ctx context.Context, id string, limit int) (list []stored, err error) {
	path := "/session/" + id + "/message"
	if limit > 0 {
		path += "?limit=" + strconv.Itoa(limit)
	}
	return list, a.do(ctx, http.MethodGet, path, nil, &list)
}

func (a api) todos(ctx context.Context, id string) (list []todo, err error) {
	return list, a.do(ctx, http.MethodGet, "/session/"+id+"/todo", nil, &list)
}

// diff is what a prompt changed.
func (a api) diff(ctx context.Context, id, message string) (list []diff, err error) {
	return list, a.do(ctx, http.MethodGet, "/session/"+id+"/diff?messageID="+message, nil, &list)
}

// busy are the conversations that are not idle. It is asked again and again, so that it is
// not waited for long.
func (a api) busy(ctx context.Context) (list map[string]status, err error) {
	ctx, stop := context.WithTimeoutCause(ctx, callTime/6, fmt.Errorf("no answer within %v", callTime/6))
	defer stop()
	return list, a.do(ctx, http.MethodGet, "/session/status", nil, &list)
}

func (a api) permissions(ctx context.Context) (list []pending, err error) {
	return list, a.do(ctx, http.MethodGet, "/permission", nil, &list)
}

func (a api) questions(ctx context.Context) (list []pending, err error) {
	return list, a.do(ctx, http.MethodGet, "/question", nil, &list)
}

func (a api) replyPermission(ctx context.Context, id, reply, message string) error {
	in := map[string]string{"reply": reply}
	if message != "" {
		in["message"] = message
	}
	return a.do(ctx, http.MethodPost, "/permission/"+id+"/reply", in, nil)
}

func (a api) replyQuestion(ctx context.Context, id string, answers [][]string) error {
	return a.do(ctx, http.MethodPost, "/question/"+id+"/reply", map[string]any{"answers": answers}, nil)
}

func (a api) rejectQuestion(ctx context.Context, id string) error {
	return a.do(ctx, http.MethodPost, "/question/"+id+"/reject", nil, nil)
}
