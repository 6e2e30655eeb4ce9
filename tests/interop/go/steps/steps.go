// Package steps follows what the script that runs a client does to its agent. The steps come by lines: which identities every
// client must have, by its stream and by a call, before the step is answered with the same line.
package steps

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Patience is how long a step may take.
const Patience = 90 * time.Second

// Told is what a stream was told last: serial numbers by the last part of a SPIFFE ID.
type Told struct {
	mutex   sync.Mutex
	serials map[string]string
}

// Tell takes what came.
func (t *Told) Tell(serials map[string]string) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.serials = serials
}

func (t *Told) now() map[string]string {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	return t.serials
}

// Last is the last part of a SPIFFE ID.
func Last(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// Client is one of those that follow.
type Client struct {
	*Told
	// Call makes a call and says whose identities it got; nil where there is none.
	Call   func() ([]string, error)
	before map[string]string
}

// Whether it has these identities, none of them as it was before.
func (c *Client) has(want []string) error {
	serials := c.now()
	for _, id := range want {
		if serials[id] == "" || serials[id] == c.before[id] {
			return fmt.Errorf("it was told of %v", serials)
		}
	}
	if len(serials) != len(want) {
		return fmt.Errorf("it was told of %v", serials)
	}
	if c.Call == nil {
		return nil
	}
	got, err := c.Call()
	if err != nil {
		return err
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		return fmt.Errorf("a call got %v", got)
	}
	return nil
}

// Follow has the clients follow, to the end of the input. What each step took the slowest is told beside it.
func Follow(clients map[string]*Client) {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		step, ids, _ := strings.Cut(lines.Text(), " ")
		if step == "forget" {
			for _, client := range clients {
				client.before = client.now()
			}
			continue
		}
		want := strings.Split(ids, ",")
		began := time.Now()
		var all sync.WaitGroup
		var mutex sync.Mutex
		took := map[string]time.Duration{}
		for name, client := range clients {
			all.Go(func() {
				for err := client.has(want); err != nil; err = client.has(want) {
					if time.Since(began) > Patience {
						fmt.Fprintf(os.Stderr, "FAILED: %s: %s: %v\n", step, name, err)
						os.Exit(1)
					}
					time.Sleep(100 * time.Millisecond)
				}
				mutex.Lock()
				defer mutex.Unlock()
				took[name] = time.Since(began)
			})
		}
		all.Wait()
		names := slices.SortedFunc(maps.Keys(took), func(a, b string) int { return int(took[b] - took[a]) })
		fmt.Printf("   %s, %.0f s after %s; %s %.0f s\n", names[0], took[names[0]].Seconds(), step, names[len(names)-1], took[names[len(names)-1]].Seconds())
		fmt.Printf("%s: %s\n", step, ids)
	}
}
